"""How far a rate carries: what each source's prompts are refused at the bias of all, and of others.

A rate holds for prompts like the calibration's. Where its sources behave differently, prompts of
yet another kind will too.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.calibration import LEAST_PROMPTS, Calibration
from models.solver import Target, solve
from training.data.rows import Row

if TYPE_CHECKING:
    from rich.table import Table

RATE = 0.5
SURELY = 0.01


class Source(NamedTuple):
    """One source's prompts of one category.

    Attributes:
        refused: Share of them refused at the bias that refuses `RATE` of the category's prompts.
        left_out: The same where the bias is solved without the source; None where too few other
            prompts are left.
    """

    category: str
    name: str
    prompts: int
    refused: float
    left_out: float | None


class Sources(NamedTuple):
    """The sources of every category that has several.

    Attributes:
        differing: Categories whose sources differ by more than chance explains (chi-square test).
    """

    found: tuple[Source, ...]
    differing: tuple[str, ...]

    @property
    def error(self) -> float | None:
        """Mean distance between `RATE` and what a source left out of the calibration is refused."""
        distances = [abs(s.left_out - RATE) for s in self.found if s.left_out is not None]
        return float(np.mean(distances)) if distances else None

    def table(self) -> "Table":
        """Returns what a person reads."""
        from rich.table import Table

        table = Table(title=f"Refused at rate {RATE:.0%}, by source", caption=self._caption())
        for heading in ("category", "source", "prompts", "refused", "source left out"):
            table.add_column(
                heading, justify="left" if heading in ("category", "source") else "right"
            )
        for source in self.found:
            left_out = "-" if source.left_out is None else f"{source.left_out:.0%}"
            cells = (source.category, source.name, f"{source.prompts}", f"{source.refused:.0%}")
            table.add_row(*cells, left_out)
        return table

    def _caption(self) -> str:
        parts = []
        if self.differing:
            parts.append(
                f"The sources of {', '.join(self.differing)} differ by more than chance explains: "
                "a rate will not hold for prompts unlike these."
            )
        if self.error is not None:
            parts.append(
                f"For a source left out, a rate of {RATE:.0%} is missed by {100 * self.error:.0f} "
                "points in mean."
            )
        return " ".join(parts)


def compare_sources(calibration: Calibration, rows: Sequence[Row]) -> Sources:
    """Compares the sources of each category, those of at least `LEAST_PROMPTS` prompts.

    Args:
        rows: The calibration's prompts, in its order.
    """
    names = np.array([_source(row.origin) for row in rows])
    found: list[Source] = []
    differing: list[str] = []
    for column, category in enumerate(calibration.names):
        own = calibration.category == column
        counts = {str(name): int((own & (names == name)).sum()) for name in np.unique(names[own])}
        several = [name for name, count in counts.items() if count >= LEAST_PROMPTS]
        if len(several) < 2:
            continue
        refused = _refused(calibration, category, np.ones(len(own), bool))
        sources = [own & (names == name) for name in several]
        found += [
            Source(
                category,
                name,
                counts[name],
                float(refused[source].mean()),
                _left_out(calibration, category, source),
            )
            for name, source in zip(several, sources, strict=True)
        ]
        if _differ([refused[source] for source in sources]):
            differing.append(category)
    return Sources(tuple(found), tuple(differing))


def _source(origin: str) -> str:
    return re.sub(r"(:\d+|, row \d+)$", "", origin)


def _refused(
    calibration: Calibration, category: str, solved_on: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Returns which prompts are refused at the bias that some of them give."""
    part = replace(
        calibration,
        margins=calibration.margins[solved_on],
        log_normaliser=calibration.log_normaliser[solved_on],
        category=calibration.category[solved_on],
    )
    biases = np.array(solve(part, {category: Target(rate=RATE)}).biases)
    refused: NDArray[np.bool_] = (calibration.margins + biases >= 0).any(axis=1)
    return refused


def _left_out(calibration: Calibration, category: str, source: NDArray[np.bool_]) -> float | None:
    own = calibration.category == calibration.column(category)
    if (own & ~source).sum() < LEAST_PROMPTS:
        return None
    return float(_refused(calibration, category, ~source)[source].mean())


def _differ(groups: Sequence[NDArray[np.bool_]]) -> bool:
    from scipy.stats import chi2_contingency

    counts = np.array([[group.sum(), (~group).sum()] for group in groups])
    if not counts.sum(axis=0).all():
        return False
    return bool(chi2_contingency(counts).pvalue < SURELY)
