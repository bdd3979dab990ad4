"""Does a flexible loss help to learn refusals? Real prompts, many seeds, every loss tuned alike.

The data are a folder with train.jsonl, calibration.jsonl and eval.jsonl (training/data.py reads
them). What is learnt is the control token alone. Each static loss gets four trainings over learning
rate and own parameter, chosen by the area under the ROC curve on calibration.jsonl; the flexible
one gets `auto` at two learning rates. Then the winners are trained once a seed and measured on
eval.jsonl ten times on the way. Every finished training is a line of results.jsonl: a run that is
stopped goes on when it is started again, and --seeds can be raised later.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

TUNING_SEED = 1000
FLEXIBLE = "flexible, auto"
CROSS_ENTROPY = "cross-entropy"
METRICS = (
    "auc",
    "refused_at_5",
    "falsely_refused",
    "refused",
    "right_category",
    "calibration_error",
)
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TWO_RATES = (1e-3, 2e-3)


class Trial(NamedTuple):
    """One training.

    Attributes:
        loss: What the table calls it.
        q: See loss/flexible.py, or `auto`.
        gamma: As `q`.
        learning_rate: At the end of the warm-up.
        seed: Of weights and order.
        data: The file that is measured on.
    """

    loss: str
    q: float | str
    gamma: float | str
    learning_rate: float
    seed: int
    data: str


GRID: dict[str, tuple[tuple[float | str, float | str, float], ...]] = {
    CROSS_ENTROPY: tuple((0.0, 0.0, rate) for rate in RATES),
    "focal": tuple((0.0, gamma, rate) for gamma in (1.0, 2.0) for rate in TWO_RATES),
    "generalised cross-entropy": tuple((q, 0.0, rate) for q in (0.3, 0.7) for rate in TWO_RATES),
    "MAE": tuple((1.0, 0.0, rate) for rate in RATES),
    "quadratic": tuple((1.0, 1.0, rate) for rate in RATES),
    "exponential": tuple((-1.0, 0.0, rate) for rate in RATES),
    FLEXIBLE: tuple(("auto", "auto", rate) for rate in TWO_RATES),
}


def recipe(trial: Trial, folder: Path, epochs: float, every: float) -> dict[str, Any]:
    """Returns the recipe of a trial, as a recipe file would hold it."""
    return {
        "name": "refusal",
        "seed": trial.seed,
        "model": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "layers": 2,
            "heads": 2,
            "intermediate_size": 384,
            "max_length": 512,
        },
        "data": {"train": [str(folder / "train.jsonl")], "too_long": "cut_or_drop"},
        "loss": {
            "decision": {"q": trial.q, "gamma": trial.gamma, "weight": 1},
            "text": {"weight": 0},
        },
        "optimisation": {
            "epochs": epochs,
            "batch_size": 48,
            "learning_rate": trial.learning_rate,
            "warmup_ratio": 0.06,
            "weight_decay": 0.05,
            "beta2": 0.98,
            "max_length": 512,
            "save_every": 0,
        },
        "evaluation": {
            "data": [str(folder / trial.data)],
            "every": every,
            "rows": 100_000,
            "best": "last",
            "flip_sample": 0,
        },
    }


def run(trial: Trial, folder: Path, epochs: float, every: float) -> dict[str, Any]:
    """Trains once and returns what was measured on the way."""
    import torch

    from training.config import TrainConfig
    from training.train import train

    torch.set_num_threads(1)
    config = TrainConfig.model_validate(recipe(trial, folder, epochs, every))
    with tempfile.TemporaryDirectory() as made:
        out = train(config, Path(made) / "checkpoint")
        log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
        choice = out / "loss_choice.json"
        chosen = json.loads(choice.read_text()) if choice.is_file() else None
    history = [
        {"step": entry["step"], **{name: entry[f"eval_{name}"] for name in METRICS}}
        for entry in log
        if "eval_auc" in entry
    ]
    picked = chosen and {"q": chosen["q"], "gamma": chosen["gamma"], "reason": chosen["reason"]}
    return {**trial._asdict(), "epochs": epochs, "history": history, "chosen": picked}


class Runs:
    """Trainings with a memory on disk.

    Args:
        folder: The data.
        out: Where results.jsonl goes.
        epochs: Passes over the data.
        jobs: Trainings at a time, one core each.
    """

    def __init__(self, folder: Path, out: Path, epochs: float, jobs: int) -> None:
        self._folder, self._epochs, self._jobs = folder, epochs, jobs
        self._path = out / "results.jsonl"
        self._done: dict[Trial, dict[str, Any]] = {}
        for line in self._path.read_text().splitlines() if self._path.is_file() else []:
            result = json.loads(line)
            if result["epochs"] == epochs:
                self._done[Trial(*(result[name] for name in Trial._fields))] = result

    def all(self, what: str, trials: Sequence[Trial], every: float) -> list[dict[str, Any]]:
        """Returns the result of each trial; runs those that have none yet."""
        open_trials = [trial for trial in trials if trial not in self._done]
        context = multiprocessing.get_context("spawn")
        with (
            Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar,
            ProcessPoolExecutor(self._jobs, mp_context=context) as pool,
        ):
            task = bar.add_task(what, total=len(trials), completed=len(trials) - len(open_trials))
            waiting = {
                pool.submit(run, trial, self._folder, self._epochs, every): trial
                for trial in open_trials
            }
            for future in as_completed(waiting):
                self._keep(waiting[future], future.result())
                bar.advance(task)
        return [self._done[trial] for trial in trials]

    def _keep(self, trial: Trial, result: dict[str, Any]) -> None:
        self._done[trial] = result
        with self._path.open("a") as file:
            file.write(json.dumps(result) + "\n")


def tuned(runs: Runs) -> dict[str, tuple[float | str, float | str, float]]:
    """Returns the best setting of each loss, by its area on calibration.jsonl."""
    trials = [
        Trial(loss, q, gamma, rate, TUNING_SEED, "calibration.jsonl")
        for loss, settings in GRID.items()
        for q, gamma, rate in settings
    ]
    results = runs.all("tuning", trials, every=1.0)
    best: dict[str, tuple[float | str, float | str, float]] = {}
    for loss in GRID:
        own = [result for result in results if result["loss"] == loss]
        winner = max(own, key=lambda result: result["history"][-1]["auc"])
        best[loss] = (winner["q"], winner["gamma"], winner["learning_rate"])
    return best


def steps_to(history: Sequence[dict[str, Any]], auc: float) -> int | None:
    """Returns the first measured step whose area reaches a value, None where none does."""
    return next((entry["step"] for entry in history if entry["auc"] >= auc), None)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its 95 % interval by Student's t."""
    import numpy as np
    from scipy.stats import t

    if len(values) < 2:
        return fmean(values), float("nan")
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5
    return fmean(values), float(t.ppf(0.975, len(values) - 1)) * error


def summary(
    settings: dict[str, tuple[float | str, float | str, float]], results: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Returns a row of the table for each loss."""
    by_loss = {loss: [r for r in results if r["loss"] == loss] for loss in settings}
    reference = {r["seed"]: max(e["auc"] for e in r["history"]) for r in by_loss[CROSS_ENTROPY]}
    plain = {r["seed"]: r["history"][-1]["auc"] for r in by_loss[CROSS_ENTROPY]}
    ours = {r["seed"]: steps_to(r["history"], reference[r["seed"]]) for r in by_loss[CROSS_ENTROPY]}
    rows = []
    for loss, own in by_loss.items():
        needed = [steps_to(r["history"], reference[r["seed"]]) for r in own]
        ratios = [
            n / (ours[r["seed"]] or 1) for n, r in zip(needed, own, strict=True) if n is not None
        ]
        final = {name: interval([r["history"][-1][name] for r in own]) for name in METRICS}
        gain = interval([r["history"][-1]["auc"] - plain[r["seed"]] for r in own])
        q, gamma, rate = settings[loss]
        rows.append(
            {
                "loss": loss,
                "q": q,
                "gamma": gamma,
                "learning_rate": rate,
                "seeds": len(own),
                "final": final,
                "auc_gain": gain,
                "reached": len(ratios),
                "steps_ratio": interval(ratios) if ratios else None,
            }
        )
    return rows


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table."""
    head = (
        "| loss | q | gamma | lr | seeds | AUC | AUC - cross-entropy's | refused at 5 % | "
        "calibration error | reached | steps / cross-entropy's |"
    )
    lines = [head, "|---" * 11 + "|"]
    for row in rows:
        auc, at_5, error = (
            _pm(row["final"][name]) for name in ("auc", "refused_at_5", "calibration_error")
        )
        steps = "-" if row["steps_ratio"] is None else _pm(row["steps_ratio"], 2)
        lines.append(
            f"| {row['loss']} | {row['q']} | {row['gamma']} | {row['learning_rate']:g} | "
            f"{row['seeds']} | {auc} | {_pm(row['auc_gain'], 4)} | {at_5} | {error} | "
            f"{row['reached']} | {steps} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws the mean area over the steps of each loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for loss in GRID:
        curves = [[e["auc"] for e in r["history"]] for r in results if r["loss"] == loss]
        steps = next(([e["step"] for e in r["history"]] for r in results if r["loss"] == loss), [])
        if curves:
            axes.plot(steps, np.mean(curves, axis=0), label=f"{loss} ({len(curves)} seeds)")
    axes.set(xlabel="step", ylabel="AUC, refuse against respond, eval.jsonl", ylim=(0.6, 1.0))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _pm(value: tuple[float, float], digits: int = 3) -> str:
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def _measured(
    settings: dict[str, tuple[float | str, float | str, float]], seeds: int
) -> Iterator[Trial]:
    for seed in range(seeds):
        for loss, (q, gamma, rate) in settings.items():
            yield Trial(loss, q, gamma, rate, seed, "eval.jsonl")


def main() -> None:
    """Runs the experiment."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the three files")
    parser.add_argument("--out", type=Path, default=Path("bench/refusal"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    for name in ("train.jsonl", "calibration.jsonl", "eval.jsonl"):
        if not (options.data / name).is_file():
            parser.error(f"{options.data / name} does not exist")
    options.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.data, options.out, options.epochs, options.jobs)
    settings = tuned(runs)
    results = runs.all("seeds", list(_measured(settings, options.seeds)), every=0.1)
    rows = summary(settings, results)
    (options.out / "refusal.json").write_text(json.dumps(rows, indent=2) + "\n")
    (options.out / "refusal.md").write_text(as_markdown(rows))
    draw(results, options.out / "refusal.png")
    Console().print((options.out / "refusal.md").read_text(), markup=False)


if __name__ == "__main__":
    main()
