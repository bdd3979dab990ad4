"""One job of `benchmarks.losses.label_noise`: every loss tuned, trained and tested."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.model_selection import train_test_split
from torch import Tensor

from benchmarks.losses.networks import Candidate, Samples, accuracy, ranking, train
from loss import members

TABLES: dict[str, Callable[..., Any]] = {
    "digits": load_digits,
    "breast cancer": load_breast_cancer,
    "wine": load_wine,
}
NOISES = (0.0, 0.2, 0.4)
STEPS = 300
SEEDS = 20
SEEDS_AT_ONCE = 5
FLEXIBLE = "flexible, auto"
CROSS_ENTROPY = "cross-entropy"


class Problem(NamedTuple):
    """One table with one share of wrong labels.

    Attributes:
        inner: What candidates are trained on.
        validation: What they are chosen by; labels as wrong.
        train: Both together.
        test: Labels untouched.
    """

    inner: Samples
    validation: Samples
    train: Samples
    test: Samples
    classes: int


class Job(NamedTuple):
    """What one process does at a time.

    Attributes:
        noise: Share of wrong labels.
    """

    table: str
    noise: float
    seeds: tuple[int, ...]
    steps: int


class Outcome(NamedTuple):
    """What came out for some seeds of one table with one share of wrong labels.

    Attributes:
        curves: Test accuracy, `[seeds, losses, points]`; cross-entropy is the first loss, the
            flexible one the last.
        chosen: For each seed each loss's winner.
        search_steps: For each seed the steps that the flexible loss's search took.
    """

    curves: Any
    chosen: list[list[Candidate]]
    search_steps: list[float]


class Found(NamedTuple):
    """The flexible loss's search: its winner and what it took.

    Attributes:
        cost: In whole trainings.
    """

    winner: Candidate
    cost: float


def spread(number: int) -> list[float]:
    """Returns learning rates at even ratios."""
    return [float(value) for value in np.geomspace(1e-3, 5e-2, number)]


TRIALS = 12
FINE, COARSE = spread(TRIALS), spread(TRIALS // 3)
STATIC: dict[str, list[Candidate]] = {
    CROSS_ENTROPY: [Candidate(lr, members.CROSS_ENTROPY) for lr in FINE],
    "focal": [Candidate(lr, members.focal(gamma)) for gamma in (0.5, 1.0, 2.0) for lr in COARSE],
    "MAE": [Candidate(lr, members.HALF_ABSOLUTE) for lr in FINE],
    "quadratic": [Candidate(lr, members.QUADRATIC) for lr in FINE],
    "generalised CE": [
        Candidate(lr, members.generalised_cross_entropy(q))
        for q in (0.3, 0.5, 0.7)
        for lr in COARSE
    ],
    "exponential": [Candidate(lr, members.EXPONENTIAL) for lr in FINE],
}
NAMES = [*STATIC, FLEXIBLE]
FAMILY = (
    members.CROSS_ENTROPY,
    members.focal(1.0),
    members.generalised_cross_entropy(0.3),
    members.generalised_cross_entropy(0.7),
    members.HALF_ABSOLUTE,
    members.QUADRATIC,
    members.Member(0.5, 1.0),
    members.Member(1.5, 0.5),
    members.Member(-0.5, 0.0),
)
SEARCH = [Candidate(lr, member) for member in FAMILY for lr in COARSE]
# 36 short, 7 to 9 middling and 1 to 3 whole trainings: 6 + 3 + 3 = 12 whole ones at most.
BUDGETS = (1 / 6, 1 / 3, 1.0)
KEEP = (7, 1)
STANDARDS = (members.CROSS_ENTROPY, members.HALF_ABSOLUTE)
# If the best candidate is wrong on more of the rows set aside, their labels are not to be trusted.
CLEAN_ERROR = 0.1
GAIN_IN_ERRORS = 1.5


def problem(table: str, noise: float, seeds: Sequence[int]) -> Problem:
    """Splits a table and spoils the labels of its training part, once for each seed."""
    features, labels = TABLES[table](return_X_y=True)
    classes = int(labels.max()) + 1
    parts = [_one_problem(features, labels, classes, noise, seed) for seed in seeds]
    inner, validation, whole, test = (
        Samples(
            torch.tensor(np.stack([part[at][0] for part in parts]), dtype=torch.float32),
            torch.tensor(np.stack([part[at][1] for part in parts])),
        )
        for at in range(4)
    )
    return Problem(inner, validation, whole, test, classes)


def _one_problem(
    features: Any, labels: Any, classes: int, noise: float, seed: int
) -> list[tuple[Any, Any]]:
    """Returns inner, validation, training and test rows."""
    x, x_test, y, y_test = train_test_split(
        features, labels, test_size=0.3, random_state=seed, stratify=labels
    )
    scale = np.where(x.std(0) > 0, x.std(0), 1.0)
    x, x_test = (x - x.mean(0)) / scale, (x_test - x.mean(0)) / scale
    random = np.random.default_rng(seed)
    wrong = random.random(len(y)) < noise
    y = np.where(wrong, (y + random.integers(1, classes, len(y))) % classes, y)
    cut = len(y) // 4  # train_test_split has shuffled them
    return [(x[cut:], y[cut:]), (x[:cut], y[:cut]), (x, y), (x_test, y_test)]


def score(logits: Tensor, y: Tensor) -> Tensor:
    """Returns what every choice goes by, `[S, C]`: accuracy, and among equal ones the ranking.

    Both keep their order, in expectation, when labels are wrong at random.
    """
    return accuracy(logits, y) + 1e-3 * ranking(logits, y)


def run(job: Job) -> Outcome:
    """Tunes every loss, and trains and tests the winners."""
    torch.set_num_threads(1)
    posed = problem(job.table, job.noise, job.seeds)
    static = _choose_static(posed, job)
    searched = _search(posed, job)
    chosen = [[*row, found.winner] for row, found in zip(static, searched, strict=True)]
    tested = train(
        chosen, posed.train, posed.test, posed.classes, job.seeds, job.steps, measure=accuracy
    )
    spent = [found.cost * job.steps for found in searched]
    return Outcome(tested.curves.numpy(), chosen, spent)


def _choose_static(posed: Problem, job: Job) -> list[list[Candidate]]:
    """Returns for each seed the best candidate of each static loss."""
    tried = [candidate for own in STATIC.values() for candidate in own]
    scores = _scores([tried] * len(job.seeds), posed, job, 1.0)
    places = scores.view(len(job.seeds), len(STATIC), TRIALS).argmax(-1).tolist()
    return [[own[place] for own, place in zip(STATIC.values(), row, strict=True)] for row in places]


def _search(posed: Problem, job: Job) -> list[Found]:
    """Returns for each seed the result of successive halving; all seeds in step."""
    left = [list(SEARCH) for _ in job.seeds]
    spent = [0.0] * len(left)
    for budget, keep in zip(BUDGETS, (*KEEP, None), strict=True):
        widest = max(map(len, left))
        # A seed whose best cross-entropy is among the best anyway has one candidate fewer.
        padded = [[*some, *some[:1] * (widest - len(some))] for some in left]
        scores = _scores(padded, posed, job, budget).tolist()
        spent = [cost + budget * len(some) for cost, some in zip(spent, left, strict=True)]
        left = [
            _best(some, own[: len(some)], keep, posed.validation.y.shape[1])
            for some, own in zip(left, scores, strict=True)
        ]
    return [Found(winner, cost) for (winner,), cost in zip(left, spent, strict=True)]


def _best(
    candidates: Sequence[Candidate], scores: Sequence[float], keep: int | None, rows: int
) -> list[Candidate]:
    """Returns the candidates that go on, or the winner where `keep` is None.

    The best of each standard goes on in any case. One of them wins unless the best candidate gains
    enough on it: cross-entropy where the best is right on most rows, else MAE.
    """
    ranked = sorted(range(len(candidates)), key=scores.__getitem__, reverse=True)
    standards = [
        next(at for at in ranked if candidates[at].member == standard) for standard in STANDARDS
    ]
    if keep is not None:
        kept = {*ranked[:keep], *standards}
        return [candidate for at, candidate in enumerate(candidates) if at in kept]
    best, standing = ranked[0], standards[int(1 - scores[ranked[0]] > CLEAN_ERROR)]
    score = scores[standing]
    least_gain = GAIN_IN_ERRORS * math.sqrt(max(score * (1 - score), 0.0) / rows)
    return [candidates[best if scores[best] - score > least_gain else standing]]


def _scores(
    candidates: Sequence[Sequence[Candidate]], posed: Problem, job: Job, share: float
) -> Tensor:
    steps = round(share * job.steps)
    trained = train(candidates, posed.inner, posed.validation, posed.classes, job.seeds, steps)
    return score(trained.logits, posed.validation.y)


def jobs(seeds: int, steps: int) -> Iterator[Job]:
    """Yields all there is to do."""
    for table in TABLES:
        for noise in NOISES:
            for first in range(0, seeds, SEEDS_AT_ONCE):
                last = min(first + SEEDS_AT_ONCE, seeds)
                yield Job(table, noise, tuple(range(first, last)), steps)
