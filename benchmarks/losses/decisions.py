"""Does flexibility help on a real model's decisions? Every loss tuned alike, with wrong labels too.

    python -m benchmarks.losses.decisions checkpoints/smollm2-tokens --out bench/losses

The rows are the states that a checkpoint of `train: tokens` keeps of its training prompts: what its
output layer reads at the decision step. For each seed 30 % of them are set aside to test on, with
right labels, and a fifth of the rest to choose by, with labels as wrong as the others. Each static
loss gets the same number of trainings of output rows over learning rate and own parameter; the
flexible loss gets at most as many steps for successive halving over the family, where cross-entropy
stands unless another member's area under the ROC curve is better by half its standard error. The
winners are trained anew on all but the test rows.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.numpy import load_file
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks.losses.label_noise import Interval, Pace, interval, paces
from benchmarks.losses.networks import TEST_EVERY, Candidate, Samples, train
from benchmarks.losses.noise import BUDGETS, COARSE, FAMILY, FLEXIBLE, KEEP, STATIC, TRIALS
from loss import members
from models.manifest import load_manifest
from training.measure.metrics import decision_metrics
from training.run.kept_states import KEPT_STATES

NOISES = (0.0, 0.2)
STEPS = 400
SEEDS = 5
LOSSES = {name: STATIC[name] for name in ("cross-entropy", "focal", "generalised CE")}
SEARCH = [Candidate(lr, member) for member in FAMILY for lr in COARSE]
METRICS = ("auc", "refused_at_5", "right_category", "calibration_error")
GAIN_IN_ERRORS = 0.5


class Parts(NamedTuple):
    """Rows of one seed: inner, validation, both, test."""

    inner: Samples
    validation: Samples
    train: Samples
    test: Samples


class Result(NamedTuple):
    """What came out for one share of wrong labels.

    Attributes:
        metrics: By name, `[seeds, losses]`.
        curves: Area under the ROC curve on the test rows, `[seeds, losses, points]`.
        chosen: For each seed each loss's winner.
    """

    metrics: dict[str, Any]
    curves: Any
    chosen: list[list[Candidate]]


def area(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the area under the ROC curve of refused against answered, `[S, C]`.

    Args:
        logits: `[S, C, N, classes]`, the answers last.
        labels: `[S, N]`.
    """
    scores = logits[..., :-1].amax(-1) - logits[..., -1]
    place = scores.argsort(-1).argsort(-1).double() + 1
    refused = (labels != logits.shape[-1] - 1)[:, None].double()
    count = refused.sum(-1)
    above = (place * refused).sum(-1) - count * (count + 1) / 2
    return above / (count * (labels.shape[-1] - count))


def parts_of(states: Any, labels: Any, noise: float, seed: int) -> Parts:
    """Splits the rows and spoils the labels of all but the test part."""
    x, x_test, y, y_test = train_test_split(
        states, labels, test_size=0.3, random_state=seed, stratify=labels
    )
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / scale, (x_test - mean) / scale
    random = np.random.default_rng(seed)
    classes = labels.max() + 1
    wrong = random.random(len(y)) < noise
    y = np.where(wrong, (y + random.integers(1, classes, len(y))) % classes, y)
    cut = len(y) // 5
    pieces = ((x[cut:], y[cut:]), (x[:cut], y[:cut]), (x, y), (x_test, y_test))
    return Parts(
        *(
            Samples(torch.tensor(a, dtype=torch.float32)[None], torch.tensor(b)[None])
            for a, b in pieces
        )
    )


def run(states: Any, labels: Any, noise: float, seeds: Sequence[int], steps: int) -> Result:
    """Tunes every loss, and trains and tests the winners."""
    classes = int(labels.max()) + 1
    names = [*map(str, range(classes - 1))]
    found: list[dict[str, list[float]]] = []
    curves, chosen = [], []
    for seed in track(seeds, f"decisions, {noise:.0%} of the labels wrong"):
        posed = parts_of(states, labels, noise, seed)
        winners = [*_static(posed, classes, seed, steps), _searched(posed, classes, seed, steps)]
        tested = _train(winners, posed.train, posed.test, classes, seed, steps)
        curves.append(tested.curves[0].numpy())
        chosen.append(winners)
        truth = [None if y == classes - 1 else str(int(y)) for y in posed.test.y[0]]
        rows = [
            decision_metrics((logits[:, :-1] - logits[:, -1:]).double().numpy(), truth, names)
            for logits in tested.logits[0]
        ]
        found.append({name: [row[name] for row in rows] for name in METRICS})
    metrics = {name: np.array([row[name] for row in found]) for name in METRICS}
    return Result(metrics, np.stack(curves), chosen)


def _train(
    candidates: Sequence[Candidate],
    rows: Samples,
    scored: Samples,
    classes: int,
    seed: int,
    steps: int,
) -> Any:
    several = [list(candidates)]
    return train(several, rows, scored, classes, [seed], steps, hidden=False, measure=area)


def _scores(
    candidates: Sequence[Candidate], posed: Parts, classes: int, seed: int, steps: int
) -> list[float]:
    trained = _train(candidates, posed.inner, posed.validation, classes, seed, steps)
    scores: list[float] = area(trained.logits, posed.validation.y)[0].tolist()
    return scores


def _static(posed: Parts, classes: int, seed: int, steps: int) -> list[Candidate]:
    tried = [candidate for own in LOSSES.values() for candidate in own]
    scores = np.array(_scores(tried, posed, classes, seed, steps)).reshape(len(LOSSES), TRIALS)
    return [own[int(row.argmax())] for own, row in zip(LOSSES.values(), scores, strict=True)]


def _searched(posed: Parts, classes: int, seed: int, steps: int) -> Candidate:
    left = list(SEARCH)
    for budget, keep in zip(BUDGETS, (*KEEP, None), strict=True):
        scores = _scores(left, posed, classes, seed, round(budget * steps))
        ranked = sorted(range(len(left)), key=scores.__getitem__, reverse=True)
        standard = next(at for at in ranked if left[at].member == members.CROSS_ENTROPY)
        if keep is not None:
            left = [left[at] for at in dict.fromkeys((*ranked[:keep], standard))]
            continue
        gain = scores[ranked[0]] - scores[standard]
        refused = int((posed.validation.y != classes - 1).sum())
        error = _error_of(scores[standard], refused, posed.validation.y.shape[1] - refused)
        return left[ranked[0] if gain > GAIN_IN_ERRORS * error else standard]
    raise AssertionError("the last budget has a winner")


def _error_of(auc: float, refused: int, answered: int) -> float:
    """Returns the standard error of an area (Hanley and McNeil 1982)."""
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (refused - 1) * (first - auc**2)
    variance += (answered - 1) * (second - auc**2)
    return math.sqrt(variance / (refused * answered))


def as_markdown(results: dict[str, Result], names: Sequence[str], note: str) -> str:
    """Returns one table of means and 95 % intervals over the seeds."""
    heads = ["wrong labels", "loss", *METRICS, "difference of auc", "steps to CE's best"]
    lines = [note, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for setting, result in results.items():
        pace = paces(result.curves)
        for at, name in enumerate(names):
            cells = [_shown(interval(result.metrics[metric][:, at])) for metric in METRICS]
            areas = result.metrics["auc"]
            difference = interval(areas[:, at] - areas[:, 0])
            cells += [_shown(difference, sign=True), _paced(pace[at])]
            lines.append(f"| {setting} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shown(value: Interval, *, sign: bool = False) -> str:
    return f"{value.mean:{'+' if sign else ''}.3f} ± {value.half:.3f}"


def _paced(pace: Pace) -> str:
    ratio, low, high = ("never" if np.isinf(n) else f"{n:.2f}" for n in pace)
    return f"{ratio} ({low} to {high})"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="of `train: tokens`, with decisions/")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2: one seed has no interval")
    load_manifest(arguments.checkpoint)
    kept = load_file(arguments.checkpoint / KEPT_STATES)
    states, labels = kept["states"].astype(np.float64), kept["labels"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    seeds = range(arguments.seeds)
    results = {
        f"{noise:.0%}": run(states, labels, noise, seeds, arguments.steps) for noise in NOISES
    }
    note = (
        f"{len(labels):,} prompts, seeds 0 to {arguments.seeds - 1}, {arguments.steps} steps of "
        f"Adam, {TRIALS} trainings to tune each loss with, a point every {TEST_EVERY} steps, "
        f"torch {torch.__version__}, {time.perf_counter() - began:.0f} s."
    )
    names = [*LOSSES, FLEXIBLE]
    table = as_markdown(results, names, note)
    (arguments.out / "decisions.md").write_text(table)
    record = {
        setting: {
            "metrics": {name: values.tolist() for name, values in result.metrics.items()},
            "chosen": [[one._asdict() for one in row] for row in result.chosen],
        }
        for setting, result in results.items()
    }
    written = json.dumps({"note": note, "losses": names, "settings": record}, indent=2)
    (arguments.out / "decisions.json").write_text(written + "\n")
    Console().print(table, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
