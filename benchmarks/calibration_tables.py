"""What `benchmarks.calibration` found, as a table and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.measure.figures import CATEGORY_COLOURS, DPI, blank, dress

BOUND = 0.02

Floats = NDArray[np.float64]


class Case(NamedTuple):
    """One category's rate, asked for and achieved.

    Attributes:
        category: Whose rate.
        together: Whether all categories were asked for the same rate at once.
        asked: The rate asked for.
        calibrated: The rate on the prompts that it was solved on.
        achieved: The rate on the others.
        reachable: Whether the solver said that the rate can be met.
        within: Whether the two differ by no more than two such samples do in 95 % of cases.
    """

    category: str
    together: bool
    asked: float
    calibrated: float
    achieved: float
    reachable: bool
    within: bool


def draw(cases: Sequence[Case], moved: Floats, names: Sequence[str], path: Path) -> None:
    """Draws achieved against asked-for rates, and the matrix of movements."""
    figure, (left, middle, right) = blank(1, 3, (14.0, 4.8), width_ratios=(1, 1, 1.15))
    for axis, together, title in ((left, False, "one at a time"), (middle, True, "all at once")):
        axis.plot((0, 100), (0, 100), color="#888888", linewidth=1)
        for number, name in enumerate(names):
            own = [c for c in cases if c.category == name and c.together == together]
            axis.plot(
                [100 * case.asked for case in own],
                [100 * case.achieved for case in own],
                "o-",
                color=CATEGORY_COLOURS[number % len(CATEGORY_COLOURS)],
                markersize=4,
                linewidth=1,
                label=name,
            )
        dress(axis, f"Asked for {title}", "rate asked for (%)", "refused of other prompts (%)")
    left.legend(frameon=False)
    right.imshow(100 * moved, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(100 * moved):
        colour = "white" if value > 50 else "black"
        right.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
    right.set_xticks(range(len(names)), names, rotation=30, ha="right")
    right.set_yticks(range(len(names)), names)
    right.set_title("Moved as the row's rate goes from 10 to 90 % (points)", fontsize=11)
    figure.savefig(path, dpi=DPI)


def summary(cases: Sequence[Case], kind: str) -> str:
    """Returns one line of the table of rates."""
    errors = 100 * np.array([abs(case.achieved - case.asked) for case in cases])
    own = 100 * np.array([abs(case.calibrated - case.asked) for case in cases])
    within = sum(case.within for case in cases)
    return (
        f"| {kind} | {len(cases)} | {own.max():.2f} | {errors.mean():.2f} | {errors.max():.2f} "
        f"| {within} ({100 * within / len(cases):.0f} %) |"
    )


def as_markdown(results: dict[str, Any], cases: Sequence[Case], names: Sequence[str]) -> str:
    """Returns the report."""
    met = [case for case in cases if case.reachable]
    missed = [case for case in cases if not case.reachable]
    kinds = {
        "one at a time": [case for case in met if not case.together],
        "all at once": [case for case in met if case.together],
        "both": met,
    }
    lines = ["# Calibration: asked for, and achieved", "", results["setting"], "", "## Rates", ""]
    lines += [
        "| asked for | cases | largest error on the calibration prompts, points | mean error on "
        "the evaluation prompts, points | largest | within the 95 % interval |",
        "|---|---|---|---|---|---|",
        *(summary(chosen, kind) for kind, chosen in kinds.items() if chosen),
        "",
    ]
    if missed:
        told = ", ".join(
            f"{case.category} {case.asked:.0%} (least: {case.calibrated:.1%})" for case in missed
        )
        lines += [f"Not reachable, and said so by the solver: {told}.", ""]
    lines += ["## One rate from 10 to 90 %, all others counted (points)", ""]
    lines += matrix(results["moved"], names)
    lines += ["", "What the prompts in between explain:", "", *matrix(results["shared"], names)]
    lines += ["", f"## False refusals, bound {BOUND:.0%}, random halves", ""]
    lines += [
        "| bound on | splits | kept on the other half | chance, at least | mean share there "
        "| largest |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {found['splits']:g} | {found['kept']:g} "
        f"({found['kept'] / found['splits']:.1%}) | {found['chance']:.1%} | {found['mean']:.2%} "
        f"| {found['largest']:.2%} |"
        for kind, found in results["bounds"].items()
    ]
    lines += ["", "## Real requests", ""]
    for found in results["requests"]:
        asked = ", ".join(f"{name} {rate:.0%}" for name, rate in found["asked"].items())
        got = ", ".join(f"{name} {rate:.1%}" for name, rate in found["achieved"].items())
        lines.append(
            f"* asked for {asked}: achieved {got}; {found['decided_as_offline']} of "
            f"{found['requests']} decided as above"
        )
    return "\n".join(lines) + "\n"


def matrix(rows: Sequence[Sequence[float]], names: Sequence[str]) -> list[str]:
    """Returns a table of points, one row for each category that was moved."""
    lines = [f"| moved | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in zip(names, rows, strict=True):
        lines.append(f"| {name} | {' | '.join(f'{100 * value:.1f}' for value in row)} |")
    return lines
