"""Whether the generated texts do what the control token says."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import NamedTuple, Protocol

from training.client import RejectedError, Reply, Settings
from training.data.rows import Row
from training.evaluation.asking import Ask, Asker
from training.evaluation.decisions import ANSWER
from training.evaluation.report import Texts
from training.evaluation.statistics import Estimate, counted, missing
from training.judging.exchanges import Exchange, Outcome
from training.judging.reading import Readers, read_texts
from training.judging.report import Readings

UNFORCED = "the policy's bounds let no decision be forced"


class Grader(Protocol):
    """Says what a text does.

    Attributes:
        name: Stands in the report.
        accuracy: Share of held-out texts that it read rightly.
    """

    name: str
    accuracy: Estimate

    def kinds(self, texts: Sequence[str]) -> list[str]:
        """Returns a category's name or `answer` for each text."""


class Sample(NamedTuple):
    """What a prompt led to.

    Attributes:
        own: The reply of the model left to itself.
        forced: What it was then forced to, against its own decision: a category or `answer`.
        flipped: The reply to that.
    """

    row: Row
    own: Reply
    forced: str
    flipped: Reply


def force(category: str, names: Sequence[str]) -> dict[str, str]:
    """Returns the dials that force a decision."""
    return {name: "always" if name == category else "never" for name in names}


async def ask_texts(asker: Asker, rows: Sequence[Row]) -> list[Sample]:
    """Asks each prompt twice: as it is, and forced against the decision that the model made.

    An answered prompt is forced to refuse for the categories in turn.
    """
    names = asker.names
    own = await asker.replies([Ask(row) for row in rows], "texts")
    forced = [
        names[number % len(names)] if reply.category is None else ANSWER
        for number, reply in enumerate(own)
    ]
    flips = [
        Ask(row, Settings(dials=force(against, names)))
        for row, against in zip(rows, forced, strict=True)
    ]
    try:
        flipped = await asker.replies(flips, "texts against the decision")
    except RejectedError as error:
        if error.status != HTTPStatus.FORBIDDEN:
            raise
        flipped = own  # the policy rejects what lies outside its bounds: nothing is forced
    return [Sample(*one) for one in zip(rows, own, forced, flipped, strict=True)]


def grade(
    samples: Sequence[Sample], names: Sequence[str], grader: Grader | None, reason: str
) -> Texts:
    """Returns what the texts do.

    Args:
        reason: Why there are no samples or no grader.
    """
    answered = [s for s in samples if s.own.category is None and s.row.answer is not None]
    right = sum(_holds(sample.own.text, str(sample.row.answer)) for sample in answered)
    known = counted(right, len(answered), "no answered prompt has a known answer")
    if grader is None or not samples:
        nothing = missing(reason)
        return Texts(
            own_fidelity=nothing,
            flip_to_respond=nothing,
            flip_to_refuse=dict.fromkeys(names, nothing),
            right_answers=known,
            grader="none",
            grader_accuracy=nothing,
        )
    own = grader.kinds([sample.own.text for sample in samples])
    flips = _flips(samples, grader)
    return Texts(
        own_fidelity=_share(
            [
                (sample.own.category or ANSWER) == kind
                for sample, kind in zip(samples, own, strict=True)
            ],
            reason,
        ),
        flip_to_respond=_share(flips.get(ANSWER, []), _lacking(samples, ANSWER)),
        flip_to_refuse={
            name: _share(flips.get(name, []), _lacking(samples, name)) for name in names
        },
        right_answers=known,
        grader=grader.name,
        grader_accuracy=grader.accuracy,
    )


async def read_samples(
    asker: Asker,
    samples: Sequence[Sample],
    grader: Grader | None,
    readers: Readers,
    seed: int,
) -> Readings:
    """Returns who reads the model's own texts as refusals, the control token first."""
    exchanges = [Exchange(one.row.messages[-2].content, one.own.text) for one in samples]
    known = {"token": [_outcome(sample.own.category or ANSWER) for sample in samples]}
    if grader is not None:
        kinds = grader.kinds([exchange.text for exchange in exchanges])
        known["wording"] = [_outcome(kind) for kind in kinds]
    asked = len(exchanges) if readers.judge else 0
    return await read_texts(
        exchanges, known, readers, asker.cache, asker.bar("texts to the judge", asked), seed
    )


def _outcome(kind: str) -> Outcome:
    return "answered" if kind == ANSWER else "refused"


def _flips(samples: Sequence[Sample], grader: Grader) -> Mapping[str, list[bool]]:
    """Returns, by what was forced, whether each text does it; what a floor undid is left out."""
    done = [one for one in samples if (one.flipped.category or ANSWER) == one.forced]
    kinds = grader.kinds([sample.flipped.text for sample in done])
    flips: dict[str, list[bool]] = {}
    for sample, kind in zip(done, kinds, strict=True):
        flips.setdefault(sample.forced, []).append(kind == sample.forced)
    return flips


def _lacking(samples: Sequence[Sample], forced: str) -> str:
    if any(sample.forced == forced for sample in samples):
        return UNFORCED
    return "no prompt was refused" if forced == ANSWER else "too few prompts were answered"


def _share(hits: Sequence[bool], reason: str) -> Estimate:
    return counted(sum(hits), len(hits), reason)


def _holds(text: str, answer: str) -> bool:
    return answer.casefold() in text.casefold()
