"""Does flexibility help? Three real tables with wrong labels, every loss tuned with equal care.

For each seed a table is split into training part and test part, a share of the training labels is
replaced by other classes at random, and a quarter of the training part is set aside to choose by;
its labels are as wrong as the others. Each static loss gets the same number of whole trainings over
learning rate and own parameter. The flexible loss gets at most as many steps in total, for
successive halving over learning rates and members of the family: cross-entropy stands unless
another is clearly better, or, where even the best candidate is wrong on a tenth of the rows set
aside, MAE, which wrong labels move least. The winner of each is trained anew on the whole training
part, and tested on labels that nobody touched.
"""

import argparse
import json
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import Progress
from scipy import stats

from benchmarks.losses.networks import TEST_EVERY
from benchmarks.losses.noise import NAMES, SEEDS, STEPS, TRIALS, Job, Outcome, jobs, run

RESAMPLINGS = 1000


class Interval(NamedTuple):
    """A mean and half the width of its 95 % interval."""

    mean: float
    half: float

    def covers_0(self) -> bool:
        """Returns whether 0 lies inside."""
        return abs(self.mean) <= self.half


class Pace(NamedTuple):
    """Steps to reach cross-entropy's best accuracy, over those that cross-entropy takes.

    Attributes:
        ratio: Of the mean curves; infinity where it is never reached.
        low: Lower end of the 95 % interval.
        high: Upper end.
    """

    ratio: float
    low: float
    high: float


def interval(values: Any) -> Interval:
    """Returns mean and Student's interval of one value a seed."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return Interval(float(values.mean()), float(half))


def first_reached(curve: Any, target: float) -> float:
    """Returns at which point, from 1, a curve first reaches the target; infinity if never."""
    reached = np.flatnonzero(curve >= target)
    return float(reached[0] + 1) if len(reached) else math.inf


def ratio_to_first(curves: Any) -> Any:
    """Returns each loss's points to reach the first loss's best, over the first one's own.

    Args:
        curves: `[losses, points]`.
    """
    target = curves[0].max()
    own = first_reached(curves[0], target)
    return np.array([first_reached(curve, target) / own for curve in curves])


def paces(curves: Any) -> list[Pace]:
    """Returns each loss's pace on the curves' mean over the seeds, with bootstrap intervals.

    Args:
        curves: `[seeds, losses, points]`.
    """
    random = np.random.default_rng(0)
    drawn = random.integers(0, len(curves), (RESAMPLINGS, len(curves)))
    again = np.stack([ratio_to_first(curves[row].mean(0)) for row in drawn])
    # Sorted by hand: interpolation between infinities is not a number.
    ordered = np.sort(again, 0)
    low, high = ordered[int(0.025 * RESAMPLINGS)], ordered[int(0.975 * RESAMPLINGS) - 1]
    rows = zip(ratio_to_first(curves.mean(0)), low, high, strict=True)
    return [Pace(*map(float, row)) for row in rows]


def verdict(finals: Any, names: Sequence[str]) -> tuple[str, Interval]:
    """Returns the best static loss in hindsight and the last loss's paired difference to it."""
    best = int(finals[:, :-1].mean(0).argmax())
    return names[best], interval(finals[:, -1] - finals[:, best])


def as_markdown(
    settings: dict[str, Outcome], names: Sequence[str], every: int, note: str
) -> tuple[str, dict[str, Any]]:
    """Returns the tables, and the same as a record.

    Args:
        every: Steps between two points of a curve.
    """
    record = {name: _record(setting, names, every) for name, setting in settings.items()}
    parts = ["# Wrong labels: static losses and the flexible one", "", note, ""]
    parts += ["## Final test accuracy, %, mean and 95 % interval over the seeds", ""]
    parts += _table(record, names, lambda row: _percent(row["accuracy"]), bold=True)
    parts += ["", "## Difference to cross-entropy, points, paired by seed", ""]
    parts += _table(record, names[1:], lambda row: _percent(row["to_cross_entropy"], sign=True))
    parts += ["", "## Steps to reach cross-entropy's best accuracy, over its own steps", ""]
    parts += _table(record, names[1:], lambda row: _pace(row["pace"]), own_steps=True)
    parts += ["", "## The flexible loss against the best static one, known only in hindsight", ""]
    parts += _verdicts(settings, names)
    return "\n".join(parts) + "\n", {"note": note, "settings": _finite(record)}


def _record(setting: Outcome, names: Sequence[str], every: int) -> dict[str, Any]:
    finals = setting.curves[:, :, -1]
    mean = setting.curves.mean(0)
    pace = paces(setting.curves)
    losses = {
        name: {
            "accuracy": interval(finals[:, at])._asdict(),
            "to_cross_entropy": interval(finals[:, at] - finals[:, 0])._asdict(),
            "pace": pace[at]._asdict(),
            "chosen": [row[at]._asdict() for row in setting.chosen],
            "final": finals[:, at].tolist(),
            "mean_curve": mean[at].tolist(),
        }
        for at, name in enumerate(names)
    }
    best, difference = verdict(finals, names)
    return {
        "losses": losses,
        "cross_entropy_best": float(mean[0].max()),
        "cross_entropy_steps": every * first_reached(mean[0], mean[0].max()),
        "most_search_steps": max(setting.search_steps),
        "best_static": best,
        "flexible_to_best_static": difference._asdict(),
    }


def _table(
    record: dict[str, Any],
    names: Sequence[str],
    cell: Any,
    *,
    bold: bool = False,
    own_steps: bool = False,
) -> list[str]:
    heads = ["table, wrong labels", *(["cross-entropy's steps"] if own_steps else []), *names]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for setting, values in record.items():
        losses = values["losses"]
        cells = [cell(losses[name]) for name in names]
        if bold:
            best = max(range(len(names)), key=lambda at: losses[names[at]]["accuracy"]["mean"])
            cells[best] = f"**{cells[best]}**"
        steps = [f"{values['cross_entropy_steps']:.0f}"] if own_steps else []
        lines.append(f"| {' | '.join([setting, *steps, *cells])} |")
    return lines


def _verdicts(settings: dict[str, Outcome], names: Sequence[str]) -> list[str]:
    lines = ["| table, wrong labels | best static | difference, points | verdict | chosen |"]
    lines.append("|---" * 5 + "|")
    for name, setting in settings.items():
        best, difference = verdict(setting.curves[:, :, -1], names)
        word = "tied" if difference.covers_0() else "better" if difference.mean > 0 else "worse"
        members = Counter(row[-1].member for row in setting.chosen).most_common(3)
        often = ", ".join(f"({m.q:g}, {m.gamma:g}) {count} times" for m, count in members)
        cell = _percent(difference._asdict(), sign=True)
        lines.append(f"| {name} | {best} | {cell} | {word} | {often} |")
    return lines


def _percent(value: dict[str, float], *, sign: bool = False) -> str:
    mean = f"{100 * value['mean']:+.1f}" if sign else f"{100 * value['mean']:.1f}"
    return f"{mean} ± {100 * value['half']:.1f}"


def _pace(value: dict[str, float]) -> str:
    words = ["never" if math.isinf(number) else f"{number:.2f}" for number in value.values()]
    return f"{words[0]} ({words[1]} to {words[2]})"


def _finite(value: Any) -> Any:
    """Returns the same with null for infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, float) and math.isinf(value):
        return None
    return value


def draw(settings: dict[str, Outcome], names: Sequence[str], every: int, path: Path) -> None:
    """Draws every setting's mean test accuracy over the steps."""
    mpl.use("Agg")
    columns = 3
    rows = -(-len(settings) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(15, 4 * rows), layout="constrained", squeeze=False
    )
    for axis, (title, setting) in zip(axes.flat, settings.items(), strict=False):
        mean = setting.curves.mean(0)
        steps = every * np.arange(1, mean.shape[-1] + 1)
        for name, curve in zip(names, mean, strict=True):
            wide = {"color": "k", "linewidth": 2.0} if name == names[-1] else {"linewidth": 1.0}
            axis.plot(steps, 100 * curve, label=name, **wide)
        axis.axhline(100 * mean[0].max(), color="C0", linestyle=":", linewidth=0.8)
        axis.set(title=f"{title} of the training labels wrong", xlabel="step", ylabel="accuracy, %")
        axis.set_ylim(bottom=max(0.0, 100 * float(mean[0].max()) - 35))
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def measure(todo: Sequence[Job], workers: int, console: Console) -> dict[str, Outcome]:
    """Runs the jobs and puts the seeds of one table and share of noise together."""
    context = multiprocessing.get_context("spawn")
    outcomes: dict[str, list[Outcome]] = {}
    with ProcessPoolExecutor(workers, context) as pool, Progress(console=console) as progress:
        bar = progress.add_task("label noise", total=len(todo))
        for job, outcome in zip(todo, pool.map(run, todo), strict=True):
            outcomes.setdefault(f"{job.table}, {job.noise:.0%}", []).append(outcome)
            progress.advance(bar)
    return {
        name: Outcome(
            np.concatenate([part.curves for part in parts]),
            [row for part in parts for row in part.chosen],
            [steps for part in parts for steps in part.search_steps],
        )
        for name, parts in outcomes.items()
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="3 seeds, short: only to try it out")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    arguments = parser.parse_args()
    seeds, steps = (3, 60) if arguments.quick else (arguments.seeds, STEPS)
    if seeds < 2:
        parser.error("--seeds must be at least 2: one seed has no interval")
    console = Console()
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    settings = measure(list(jobs(seeds, steps)), arguments.workers, console)
    lines = (
        f"Seeds 0 to {seeds - 1}, {steps} steps of Adam, batch 64, one hidden layer of 32, "
        f"{TRIALS} trainings to tune each loss with, torch {torch.__version__}, "
        f"{time.perf_counter() - began:.0f} s with {arguments.workers} processes."
    )
    table, record = as_markdown(settings, NAMES, TEST_EVERY, lines)
    (arguments.out / "label_noise.md").write_text(table)
    (arguments.out / "label_noise.json").write_text(json.dumps(record, indent=2) + "\n")
    draw(settings, NAMES, TEST_EVERY, arguments.out / "label_noise.png")
    console.print(table, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
