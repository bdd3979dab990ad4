"""Does a flexible loss help to learn refusals? Real prompts, many seeds, every loss tuned alike.

The data are a folder with train.jsonl, calibration.jsonl and eval.jsonl, in our own format.
Model and training are a recipe's: benchmarks/refusal/refusal.yaml learns the decision alone,
benchmarks/refusal/prompts.yaml the responses too. Each static loss gets four trainings over
learning rate and own parameter, chosen by the area under the ROC curve on calibration.jsonl; the
flexible one gets `auto` at two learning rates, each a search and a training. Then the winners are
trained once a seed, `auto` searching anew each time, and measured on eval.jsonl. Cross-entropy and
`auto` come first. Every finished training is a line of results.jsonl: a run that is stopped goes on
when it is started again, and the numbers of seeds can be raised.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.losses.label_noise import Interval, Pace, interval, paces
from benchmarks.refusal.training import PARTS, Search, Setup, Training, search_once, train_once

COLUMNS = {
    "auc": "AUC",
    "refused_at_5": "refused at 5 % false",
    "calibration_error": "calibration error",
}
POINTS = 100
CROSS_ENTROPY = "cross-entropy"


class Setting(NamedTuple):
    """How a loss is trained.

    Attributes:
        q: See loss/flexible.py; None: `auto` chooses q and gamma.
        learning_rate: At the end of the warm-up.
    """

    q: float | None
    gamma: float | None
    learning_rate: float


class Result(NamedTuple):
    """One training of a loss.

    Attributes:
        final: Metrics at the end.
    """

    loss: str
    training: Training
    history: list[dict[str, Any]]
    final: dict[str, float]


TUNING_SEED = 1000
FLEXIBLE = "flexible, auto"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TWO_RATES = (1e-3, 2e-3)
SEEDS_AT_ONCE = 5

Asked = TypeVar("Asked", Training, Search)

GRID: dict[str, tuple[Setting, ...]] = {
    CROSS_ENTROPY: tuple(Setting(0.0, 0.0, rate) for rate in RATES),
    FLEXIBLE: tuple(Setting(None, None, rate) for rate in TWO_RATES),
    "focal": tuple(Setting(0.0, gamma, rate) for gamma in (1.0, 2.0) for rate in TWO_RATES),
    "generalised cross-entropy": tuple(
        Setting(q, 0.0, rate) for q in (0.3, 0.7) for rate in TWO_RATES
    ),
    "MAE": tuple(Setting(1.0, 0.0, rate) for rate in RATES),
    "quadratic": tuple(Setting(1.0, 1.0, rate) for rate in RATES),
    "exponential": tuple(Setting(-1.0, 0.0, rate) for rate in RATES),
}
FIRST = (CROSS_ENTROPY, FLEXIBLE)
OTHERS = tuple(loss for loss in GRID if loss not in FIRST)


class Runs:
    """Trainings and searches with a memory on disk; what was done once is not done again.

    Args:
        jobs: Trainings at a time, one core each.
    """

    def __init__(self, setup: Setup, out: Path, jobs: int) -> None:
        self._setup, self._key = setup, setup.key()
        self._path = out / "results.jsonl"
        self._done = dict(_kept(self._path, self._key))
        self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def results(self, wanted: Sequence[tuple[str, Setting, int]], measured: str) -> list[Result]:
        """Returns the result of each (loss, setting, seed), measured on a key of `PARTS`."""
        searches = [Search(s.learning_rate, seed) for _, s, seed in wanted if s.q is None]
        self._do_all("auto", searches, search_once)
        trainings = [self._training(setting, seed, measured) for _, setting, seed in wanted]
        self._do_all("trainings", trainings, train_once)
        return [
            Result(loss, training, **self._done[training])
            for (loss, _, _), training in zip(wanted, trainings, strict=True)
        ]

    def _training(self, setting: Setting, seed: int, measured: str) -> Training:
        q, gamma, rate = setting
        if q is None or gamma is None:
            chosen = self._done[Search(rate, seed)]
            q, gamma = chosen["q"], chosen["gamma"]
        return Training(q, gamma, rate, seed, measured)

    def _do_all(
        self,
        what: str,
        asked: Sequence[Asked],
        do: Callable[[Asked, Setup], dict[str, Any]],
    ) -> None:
        left = [one for one in dict.fromkeys(asked) if one not in self._done]
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(what, total=len(left))
            waiting = {self._pool.submit(do, one, self._setup): one for one in left}
            for future in as_completed(waiting):
                self._keep(waiting[future], future.result())
                bar.advance(task)

    def _keep(self, asked: Training | Search, result: dict[str, Any]) -> None:
        self._done[asked] = result
        line = {"asked": asked._asdict(), "setup": self._key, "result": result}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _kept(path: Path, setup: str) -> list[tuple[Training | Search, dict[str, Any]]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [entry for entry in map(json.loads, lines) if entry.get("setup") == setup]
    return [
        ((Training if "q" in entry["asked"] else Search)(**entry["asked"]), entry["result"])
        for entry in kept
    ]


def tuned(runs: Runs, losses: Sequence[str]) -> dict[str, Setting]:
    """Returns the best setting of each loss, by its area on calibration.jsonl."""
    best: dict[str, Setting] = {}
    for loss in losses:
        wanted = [(loss, setting, TUNING_SEED) for setting in GRID[loss]]
        areas = [result.final["auc"] for result in runs.results(wanted, "tune")]
        best[loss] = wanted[areas.index(max(areas))][1]
    return best


def measured(runs: Runs, settings: dict[str, Setting], seeds: int) -> list[Result]:
    """Returns what the seeds from 0 on gave; a few seeds of all losses at a time."""
    found: list[Result] = []
    for first in range(0, seeds, SEEDS_AT_ONCE):
        wanted = [
            (loss, setting, seed)
            for seed in range(first, min(first + SEEDS_AT_ONCE, seeds))
            for loss, setting in settings.items()
        ]
        found += runs.results(wanted, "report")
    return found


class Row(NamedTuple):
    """What came out for one loss; differences are to cross-entropy, paired by seed.

    Attributes:
        members: How often each (q, gamma) was trained.
        final: Of each of `COLUMNS`.
        gain: The difference of each of `COLUMNS`.
        pace: Of the mean curves.
    """

    loss: str
    setting: Setting
    seeds: int
    members: dict[str, int]
    final: dict[str, Interval]
    gain: dict[str, Interval]
    pace: Pace


def summary(settings: dict[str, Setting], results: Sequence[Result]) -> list[Row]:
    """Returns a row for each loss that has two seeds at least."""
    plain = {r.training.seed: r for r in results if r.loss == CROSS_ENTROPY}
    by_loss = {loss: [r for r in results if r.loss == loss] for loss in settings}
    return [
        _row(loss, settings[loss], own, [plain[r.training.seed] for r in own])
        for loss, own in by_loss.items()
        if len(own) > 1
    ]


def _row(loss: str, setting: Setting, own: Sequence[Result], plain: Sequence[Result]) -> Row:
    pairs = list(zip(own, plain, strict=True))
    trained = [f"({_written(r.training.q)}, {r.training.gamma:g})" for r in own]
    curves = np.array([[_fine(ce.history), _fine(r.history)] for r, ce in pairs])
    return Row(
        loss,
        setting,
        len(own),
        {member: trained.count(member) for member in sorted(set(trained))},
        {name: interval(np.array([r.final[name] for r in own])) for name in COLUMNS},
        {
            name: interval(np.array([r.final[name] - ce.final[name] for r, ce in pairs]))
            for name in COLUMNS
        },
        paces(curves)[1],
    )


def _written(q: float | str) -> str:
    if not isinstance(q, str):
        return f"{q:g}"
    return "{start:g} to {end:g} over {over:g}".format(**json.loads(q))


def _fine(history: Sequence[dict[str, Any]]) -> Any:
    """Returns the area at even steps, on straight lines between what was measured; not at 0."""
    steps = [entry["step"] for entry in history]
    even = np.linspace(0, steps[-1], POINTS + 1)[1:]
    return np.interp(even, steps, [entry["auc"] for entry in history])


def as_markdown(rows: Sequence[Row]) -> str:
    """Returns the two tables: what came out, and the differences to cross-entropy."""
    finals = ["| loss | learning rate | seeds | " + " | ".join(COLUMNS.values()) + " |"]
    finals.append("|---" * (3 + len(COLUMNS)) + "|")
    gains = ["| loss | " + " | ".join(COLUMNS.values()) + " | steps, share of its own | members |"]
    gains.append("|---" * (3 + len(COLUMNS)) + "|")
    for row in rows:
        shares = " | ".join(_plus_minus(row.final[name]) for name in COLUMNS)
        finals.append(f"| {row.loss} | {row.setting.learning_rate:g} | {row.seeds} | {shares} |")
        if row.loss != CROSS_ENTROPY:
            cells = " | ".join(_plus_minus(row.gain[name], sign="+") for name in COLUMNS)
            members = ", ".join(f"{member} {times} times" for member, times in row.members.items())
            gains.append(f"| {row.loss} | {cells} | {_pace(row.pace)} | {members} |")
    return "\n".join([*finals, "", *gains]) + "\n"


def _plus_minus(value: Interval, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f} ± {value.half:.3f}"


def _pace(pace: Pace) -> str:
    ratio, low, high = ("never" if math.isinf(x) else f"{x:.2f}" for x in pace)
    return f"{ratio} ({low} to {high})"


def as_record(row: Row) -> dict[str, Any]:
    """Returns a row for a JSON file; null stands for never."""
    nested = ("setting", "pace")
    record = {**row._asdict(), **{name: getattr(row, name)._asdict() for name in nested}}
    for name in ("final", "gain"):
        record[name] = {key: value._asdict() for key, value in record[name].items()}
    record["pace"] = {k: v if math.isfinite(v) else None for k, v in record["pace"].items()}
    return record


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws the mean area over the steps of each loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for loss in dict.fromkeys(result.loss for result in results):
        histories = [result.history for result in results if result.loss == loss]
        curves = np.array([[entry["auc"] for entry in history] for history in histories])
        steps = [entry["step"] for entry in histories[0]]
        axes.plot(steps, curves.mean(0), label=f"{loss} ({len(curves)} seeds)")
    axes.set(xlabel="step", ylabel="AUC, refuse against respond, eval.jsonl")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files")
    parser.add_argument("--out", type=Path, default=Path("bench/refusal"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--other-seeds", type=int, help="of losses but cross-entropy and auto")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("refusal.yaml"))
    parser.add_argument("--losses", nargs="+", choices=OTHERS, default=OTHERS, help="the others")
    parser.add_argument("--epochs", type=float, help="in place of the recipe's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    others = options.seeds if options.other_seeds is None else options.other_seeds
    if not 0 <= others <= options.seeds or options.seeds < 2:
        parser.error("--seeds must be at least 2, --other-seeds at most as many")
    for path in (options.recipe, *(options.data / name for name in PARTS.values())):
        if not path.is_file():
            parser.error(f"{path} does not exist")
    options.out.mkdir(parents=True, exist_ok=True)
    setup = Setup(options.recipe, options.data.resolve(), options.epochs)
    with Runs(setup, options.out, options.jobs) as runs:
        settings = tuned(runs, FIRST)
        results = measured(runs, settings, options.seeds)
        if others:
            rest = tuned(runs, options.losses)
            results += measured(runs, rest, others)
            settings |= rest
    rows = summary(settings, results)
    record = json.dumps([as_record(row) for row in rows], indent=2, allow_nan=False)
    (options.out / "refusal.json").write_text(record + "\n")
    (options.out / "refusal.md").write_text(as_markdown(rows))
    draw(results, options.out / "refusal.png")
    Console().print((options.out / "refusal.md").read_text(), markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
