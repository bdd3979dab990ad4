"""Two reports on the prompts that both have: paired differences with intervals."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest

from models.errors import EvaluationError
from training.evaluation.decisions import NO_SAFE, NO_UNSAFE
from training.evaluation.report import ALL, Record, Report
from training.evaluation.statistics import (
    Estimate,
    Flags,
    Floats,
    Resamples,
    auc,
    binned_error,
    f1,
    mean,
    missing,
    of_all,
    percentiles,
)
from training.measure.metrics import equal_bins, refusal_probability, refusal_scores

Key = tuple[str, str, int]
Figure = Callable[[Floats], Floats]


class Difference(BaseModel):
    """One figure of both reports.

    Attributes:
        first: A's value; None where nothing could be graded.
        second: B's value.
        change: B minus A, with the 95 % interval of a paired bootstrap.
        only_first: Of a share, how many prompts are hits in A alone.
        only_second: How many are hits in B alone.
        p_value: McNemar's exact test of these two counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: float | None
    second: float | None
    change: Estimate
    only_first: int | None = None
    only_second: int | None = None
    p_value: float | None = None


class Comparison(BaseModel):
    """Two reports, A and B.

    Attributes:
        unpaired: How many prompts only one of the reports has.
        sets: By set, the differences by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    paired: int
    unpaired: int
    sets: dict[str, dict[str, Difference]]

    def to_json(self) -> str:
        """Returns the comparison as a JSON object."""
        return json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"


class Pairs(NamedTuple):
    """The decisions of both reports on the same n prompts.

    Attributes:
        unsafe: `[n]` whether a prompt should be refused.
        category: `[n]` its category, "" for none.
        refused: Two of `[n]`.
        scores: Two of `[n]`, log-odds of refusing.
    """

    sets: np.ndarray
    unsafe: Flags
    category: np.ndarray
    refused: tuple[Flags, Flags]
    scores: tuple[Floats, Floats]

    def of(self, members: Flags) -> "Pairs":
        """Returns some of the prompts."""
        first, second = self.refused
        one, other = self.scores
        return Pairs(
            self.sets[members],
            self.unsafe[members],
            self.category[members],
            (first[members], second[members]),
            (one[members], other[members]),
        )


def compare(first: Report, second: Report, seed: int = 0) -> Comparison:
    """Pairs the prompts of two reports by set, text and label, and compares the decisions.

    Raises:
        EvaluationError: They share no prompt.
    """
    ours, theirs = _by_key(first), _by_key(second)
    shared = [key for key in ours if key in theirs and _same(ours[key], theirs[key])]
    if not shared:
        raise EvaluationError("the two reports share no prompt: they measure other sets")
    pairs = _pairs([ours[key] for key in shared], [theirs[key] for key in shared])
    members = {name: pairs.sets == name for name in dict.fromkeys(map(str, pairs.sets))}
    return Comparison(
        paired=len(shared),
        unpaired=len(ours) + len(theirs) - 2 * len(shared),
        sets={
            ALL: _differences(pairs, seed),
            **{name: _differences(pairs.of(some), seed) for name, some in members.items()},
        },
    )


def comparison_table(comparison: Comparison, names: tuple[Path, Path]) -> Table:
    """Returns the comparison as a table for the terminal."""
    title = f"A: {names[0]}, B: {names[1]}; {comparison.paired} prompts in both"
    if comparison.unpaired:
        title += f", {comparison.unpaired} in one alone"
    table = Table("figure", "A", "B", "B - A", "95 % interval", "p (McNemar)", title=Text(title))
    for name, differences in comparison.sets.items():
        if name == ALL and len(comparison.sets) == 2:
            continue
        table.add_section()
        table.add_row(Text(name, style="bold"))
        for label, found in differences.items():
            table.add_row(*map(Text, (f"  {label}", *_cells(found))))
    return table


def _by_key(report: Report) -> dict[Key, Record]:
    """Returns the records by set, prompt, and how often the prompt came before."""
    seen: Counter[tuple[str, str]] = Counter()
    found: dict[Key, Record] = {}
    for record in report.records:
        prompt = (record.set, record.sha256)
        found[(*prompt, seen[prompt])] = record
        seen[prompt] += 1
    return found


def _same(one: Record, other: Record) -> bool:
    return one.category == other.category


def _pairs(first: list[Record], second: list[Record]) -> Pairs:
    def refused(records: list[Record]) -> Flags:
        return np.array([record.decided is not None for record in records])

    def scores(records: list[Record]) -> Floats:
        return refusal_scores(np.array([record.margins for record in records]))

    return Pairs(
        np.array([record.set for record in first]),
        np.array([record.category is not None for record in first]),
        np.array([record.category or "" for record in first]),
        (refused(first), refused(second)),
        (scores(first), scores(second)),
    )


def _differences(pairs: Pairs, seed: int) -> dict[str, Difference]:
    resamples = Resamples(len(pairs.unsafe), seed)
    unsafe = pairs.unsafe
    lacking = NO_SAFE if unsafe.all() else NO_UNSAFE
    categories = sorted({str(name) for name in pairs.category} - {""})
    groups = {
        "falsely refused": ~unsafe,
        "refused of what should be": unsafe,
        **{f"refused, {name}": pairs.category == name for name in categories},
    }
    both_sorts = None if unsafe.any() and not unsafe.all() else lacking
    return {
        **{name: _shares(pairs, group, resamples) for name, group in groups.items()},
        "F1": _paired(
            [f1(refused, unsafe) for refused in pairs.refused],
            resamples,
            None if unsafe.any() else NO_UNSAFE,
        ),
        "AUC": _paired([auc(scores, unsafe) for scores in pairs.scores], resamples, both_sorts),
        "calibration error": _paired(
            [
                binned_error(refusal_probability(scores) - unsafe, equal_bins(scores))
                for scores in pairs.scores
            ],
            resamples,
            None,
        ),
    }


def _shares(pairs: Pairs, group: Flags, resamples: Resamples) -> Difference:
    first, second = pairs.refused
    figures = [mean(np.where(group, refused, np.nan)) for refused in pairs.refused]
    found = _paired(figures, resamples, None if group.any() else "no prompt is of this kind")
    only_first = int((group & first & ~second).sum())
    only_second = int((group & second & ~first).sum())
    flips = only_first + only_second
    # Without any flip there is nothing to test: the exact p is 1.
    p_value = float(binomtest(only_first, flips).pvalue) if flips else 1.0
    return found.model_copy(
        update={"only_first": only_first, "only_second": only_second, "p_value": p_value}
    )


def _paired(figures: list[Figure], resamples: Resamples, lacking: str | None) -> Difference:
    if lacking is not None:
        return Difference(first=None, second=None, change=missing(lacking))
    first, second = (of_all(figure, resamples.n) for figure in figures)
    low, high = percentiles(resamples.of(figures[1]) - resamples.of(figures[0]))
    change = Estimate(value=second - first, n=resamples.n, low=low, high=high)
    return Difference(first=first, second=second, change=change)


def _cells(found: Difference) -> tuple[str, ...]:
    change = found.change
    if change.value is None:
        return ("-", "-", "-", change.reason or "", "")
    p_value = "" if found.p_value is None else f"{found.p_value:.3g}"
    return (
        f"{found.first:.4f}",
        f"{found.second:.4f}",
        f"{change.value:+.4f}",
        f"{change.low:+.4f} to {change.high:+.4f}",
        p_value,
    )
