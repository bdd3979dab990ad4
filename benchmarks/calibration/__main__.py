"""Ask for a rate, get it? Biases solved on one set of prompts, counted on another.

Three questions: do the achieved rates lie where sampling alone would put them; does a category's
rate move the others'; does a bound on false refusals hold on prompts that it has not seen.
Decisions are made by `models.decision.decide` on margins that the engine gave, and for some cases
by the server itself, asked for a rate.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.calibration.experiment import (
    BOUND,
    Case,
    experiment,
    measured,
    request_cases,
)
from training.calibration.prompts import Prompts, read_prompts
from training.config.data import named_sources
from training.demo_data.render import write
from training.measure.figures import DPI, blank, category_look

Floats = NDArray[np.float64]


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
                "o",
                markersize=4,
                linewidth=1,
                label=name,
                **category_look(number),
            )
        axis.set(
            title=f"Asked for {title}",
            xlabel="rate asked for (%)",
            ylabel="refused of other prompts (%)",
        )
    left.legend(frameon=False)
    right.grid(visible=False)
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


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument(
        "--data",
        type=Path,
        help="folder with calibration.jsonl and evaluation.jsonl or eval.jsonl [default: demo's]",
    )
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--no-requests", action="store_true", help="leave real requests out")
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    arguments = parser.parse_args()
    console = Console()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as rendered:
        data: Path = arguments.data or Path(rendered)
        if arguments.data is None:
            write(data, seed=0)
        held_out = next(data / n for n in ("evaluation.jsonl", "eval.jsonl") if (data / n).exists())
        model = arguments.checkpoint
        files = (data / "calibration.jsonl", held_out)
        calibration, evaluation = measured(model, files, arguments.out, console)
        rows = read_prompts(Prompts(named_sources(held_out)), calibration.names)
    cases, results = experiment(calibration, evaluation, arguments.splits, console)
    log = arguments.out / "server.log"
    results["requests"] = (
        [] if arguments.no_requests else request_cases(model, calibration, evaluation, rows, log)
    )
    counts = ", ".join(
        f"{name} {calibration.prompts[name]}/{evaluation.prompts[name]}"
        for name in calibration.names
    )
    results["setting"] = (
        f"Prompts to calibrate on / to evaluate on: {counts}, benign {calibration.benign}/"
        f"{evaluation.benign}. Rule: greedy. Rates 10, 20, … 90 %, each category alone (the others "
        "as trained) and all at once."
    )
    results["cases"] = [case._asdict() for case in cases]
    table = as_markdown(results, cases, calibration.names)
    (arguments.out / "calibration.md").write_text(table)
    (arguments.out / "calibration.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(cases, np.array(results["moved"]), calibration.names, arguments.out / "calibration.png")
    console.print(table, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
