"""How many decisions change where the same prompts are asked in another way."""

from collections.abc import Mapping

from training.evaluation.decisions import Indices, Observed
from training.evaluation.report import Variant
from training.evaluation.statistics import missing, share


def robustness(observed: Observed, asked: Mapping[str, Indices | str]) -> dict[str, Variant]:
    """Compares decisions.

    Args:
        asked: By way of asking, the `[n]` decisions; or why there are none.
    """
    return {
        name: _unknown(observed, decided)
        if isinstance(decided, str)
        else _compared(observed, decided)
        for name, decided in asked.items()
    }


def _compared(observed: Observed, decided: Indices) -> Variant:
    before, after = observed.refused, decided < len(observed.names)
    changed, both = before != after, before & after
    return Variant(
        changed=share(changed, ""),
        to_refused=share(after[~before], "every prompt is refused as it is"),
        to_answered=share(~after[before], "every prompt is answered as it is"),
        other_category=share(
            decided[both] != observed.decided[both], "no prompt is refused in both ways"
        ),
        sets={
            name: share(changed[observed.sets == name], "")
            for name in dict.fromkeys(map(str, observed.sets))
        },
    )


def _unknown(observed: Observed, reason: str) -> Variant:
    nothing = missing(reason)
    return Variant(
        changed=nothing,
        to_refused=nothing,
        to_answered=nothing,
        other_category=nothing,
        sets=dict.fromkeys(map(str, observed.sets), nothing),
    )
