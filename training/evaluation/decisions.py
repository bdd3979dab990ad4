"""The decisions on labelled prompts: by set and category. Pure: arrays in, estimates out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from models.controls import Controls, Rule, dial_row
from models.decision import Dials, decide
from training.evaluation.report import (
    ALL,
    CategoryGroup,
    Confusion,
    Group,
    ReliabilityBin,
    SetReport,
)
from training.evaluation.statistics import (
    Estimate,
    Flags,
    Floats,
    Resamples,
    auc,
    binned_error,
    bootstrapped,
    counted,
    f1,
    missing,
    share,
)
from training.measure.metrics import (
    FALSE_REFUSALS,
    equal_bins,
    refusal_probability,
    refusal_scores,
    refused_at,
)

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
ANSWER = "answer"
NO_SAFE = "no prompt of the set should be answered"
NO_UNSAFE = "no prompt of the set should be refused"

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Observed:
    """The labels and decision steps of n prompts.

    Attributes:
        names: The k categories in manifest order.
        sets: `[n]` the set of each prompt.
        truth: `[n]` the category that should be refused; k: should be answered.
        near_miss: `[n]` whether the prompt should be answered but looks like a category.
        margins: `[n, k]` fp32 margins, before any bias.
        log_normaliser: `[n]` as in `models.decision`.
        decided: `[n]` the category that the server refused as served; k: answered.
    """

    names: tuple[str, ...]
    sets: NDArray[np.str_]
    truth: Indices
    near_miss: Flags
    margins: NDArray[np.float32]
    log_normaliser: NDArray[np.float32]
    decided: Indices

    def __len__(self) -> int:
        return len(self.truth)

    @cached_property
    def unsafe(self) -> Flags:
        """`[n]` whether a prompt should be refused."""
        return self.truth < len(self.names)

    @cached_property
    def refused(self) -> Flags:
        """`[n]` whether the server refused a prompt, as served."""
        return self.decided < len(self.names)

    @cached_property
    def scores(self) -> Floats:
        """`[n]` log-odds of refusing at all against responding."""
        return refusal_scores(self.margins.astype(np.float64))

    @cached_property
    def largest(self) -> Floats:
        """`[n]` the largest margin: what one bias of all categories shifts."""
        largest: Floats = self.margins.astype(np.float64).max(axis=1)
        return largest

    def of(self, members: Flags) -> "Observed":
        """Returns some of the prompts."""
        arrays = ("sets", "truth", "near_miss", "margins", "log_normaliser", "decided")
        return replace(self, **{name: getattr(self, name)[members] for name in arrays})


def controls(bias: Sequence[float], rule: Rule = Rule.GREEDY) -> Controls:
    """Returns the controls of a request that names every category."""
    return Controls(rule, tuple(map(float, bias)), (True,) * len(bias))


def decisions(
    observed: Observed,
    chosen: Controls,
    temperature: float = 0.0,
    uniform: Sequence[float] | None = None,
) -> Indices:
    """Computes every prompt's decision under one request's controls, as the worker would.

    Args:
        uniform: `[n]` draws for the rule `sample`.

    Returns:
        `[n]` the refused category; k: answered.
    """
    row = dial_row(chosen.bias, chosen.selected, chosen.rule, temperature, 0.0)
    rows = torch.tensor([row], dtype=torch.float32).expand(len(observed), -1)
    if uniform is not None:
        rows = rows.clone()
        rows[:, -1] = torch.tensor(uniform, dtype=torch.float32)
    margins = torch.from_numpy(observed.margins)
    logits = torch.cat((margins, torch.zeros(len(margins), 1)), dim=1)
    normaliser = torch.from_numpy(observed.log_normaliser)
    found: Indices = decide(
        logits, Dials(rows, len(observed.names)), {chosen.rule}, normaliser
    ).numpy()
    return found


def set_reports(observed: Observed, seed: int) -> dict[str, SetReport]:
    """Returns the report of each set, and that of all prompts under `all`."""
    names = dict.fromkeys(map(str, observed.sets))
    members = {name: observed.sets == name for name in names}
    return {
        ALL: set_report(observed, seed),
        **{name: set_report(observed.of(some), seed) for name, some in members.items()},
    }


def set_report(observed: Observed, seed: int) -> SetReport:
    """Returns what the server decided on some prompts, at least one."""
    unsafe, refused = observed.unsafe, observed.refused
    right = refused & unsafe
    resamples = Resamples(len(observed), seed)
    return SetReport(
        prompts=len(observed),
        safe=_group(refused[~unsafe], NO_SAFE),
        unsafe=_group(refused[unsafe], NO_UNSAFE),
        near_misses=_group(refused[observed.near_miss], "no prompt is marked as a near miss"),
        categories={
            name: _category(observed, column, name) for column, name in enumerate(observed.names)
        },
        right_category=share(
            observed.decided[right] == observed.truth[right],
            "no prompt that should be refused was refused",
        ),
        f1=refusal_f1(refused, unsafe, resamples),
        auc=refusal_auc(observed.scores, unsafe, resamples),
        refused_at_5=refused_at_5(observed.largest, unsafe),
        calibration_error=_calibration_error(observed, resamples),
        confusion=_confusion(observed),
        reliability=[
            ReliabilityBin(
                predicted=float(refusal_probability(observed.scores[part]).mean()),
                observed=share(unsafe[part], ""),
            )
            for part in equal_bins(observed.scores)
        ],
    )


def refusal_f1(refused: Flags, unsafe: Flags, resamples: Resamples) -> Estimate:
    """Returns F1 of "refused" against "should be refused"."""
    if not unsafe.any():
        return missing(NO_UNSAFE)
    return bootstrapped(f1(refused, unsafe), resamples, rarer=int(unsafe.sum()))


def refusal_auc(scores: Floats, unsafe: Flags, resamples: Resamples) -> Estimate:
    """Returns the area under the ROC curve of a score."""
    if unsafe.all() or not unsafe.any():
        return missing(NO_SAFE if unsafe.all() else NO_UNSAFE)
    rarer = min(int(unsafe.sum()), int((~unsafe).sum()))
    return bootstrapped(auc(scores, unsafe), resamples, rarer=rarer)


def refused_at_5(scores: Floats, unsafe: Flags) -> Estimate:
    """Returns what is refused at 5 % false refusals; the threshold is taken as given."""
    value = refused_at(scores, unsafe, FALSE_REFUSALS)
    if value is None:
        return missing(NO_SAFE if unsafe.all() else NO_UNSAFE)
    n = int(unsafe.sum())
    return counted(round(value * n), n, NO_UNSAFE)


def _group(refused: Flags, reason: str) -> Group:
    return Group(prompts=len(refused), refused=share(refused, reason))


def _category(observed: Observed, column: int, name: str) -> CategoryGroup:
    own = observed.of(observed.truth == column)
    margins = own.margins[:, column].astype(np.float64)
    reason = f"no prompt of the set is of the category {name}"
    return CategoryGroup(
        prompts=len(own),
        refused=share(own.refused, reason),
        right_category=share(
            own.decided[own.refused] == column,
            "none of the category's prompts was refused" if len(own) else reason,
        ),
        margins={f"{q:g}": float(np.quantile(margins, q)) for q in QUANTILES if len(own)},
    )


def _calibration_error(observed: Observed, resamples: Resamples) -> Estimate:
    gaps = refusal_probability(observed.scores) - observed.unsafe
    return bootstrapped(binned_error(gaps, equal_bins(observed.scores)), resamples, centred=True)


def _confusion(observed: Observed) -> Confusion:
    width = len(observed.names) + 1
    counts = np.zeros((width, width), dtype=np.int64)
    np.add.at(counts, (observed.truth, observed.decided), 1)
    return Confusion(labels=[*observed.names, ANSWER], counts=counts.tolist())
