"""`auto`: q and gamma of the decision loss, chosen from the training data alone.

The training rows are split once more. Members of the family, one of them on a schedule, are trained
shortly on the inner training part; the best two and cross-entropy are trained longer. They are
compared by the area under the ROC curve of the decisions on the inner validation part, refused
against answered:

* It belongs to none of the losses. Log-loss is what cross-entropy itself minimises, and it measures
  calibration, which differs by q and which the dials' calibration repairs afterwards.
* It keeps its order where labels are wrong at random. If a share a of the rows labelled refused and
  a share b of those labelled answered should be the other, the expected area is
  1/2 + (1 - a - b)(clean area - 1/2): up to chance, the best member on noisy rows is the best on
  clean ones. Log-loss has no such property.

Evaluation data play no part.

Source:
    Menon, van Rooyen, Ong, Williamson: Learning from Corrupted Binary Labels via
    Class-Probability Estimation, ICML 2015. Successive halving: Jamieson and Talwalkar,
    Non-stochastic Best Arm Identification and Hyperparameter Optimization, arXiv 1502.07943.
"""

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from loss.members import CROSS_ENTROPY
from models.errors import ConfigError
from training.config.loss import AUTO, LossConfig, QSchedule
from training.config.recipe import TrainConfig
from training.data.encoding import encode_rows
from training.data.mixture import conversation_key, decision_weights
from training.data.rows import Row
from training.model.start import Start

CHOICE_NAME = "loss_choice.json"
CRITERION = "area under the ROC curve, refused against answered, on the inner validation rows"
SCORE = "auc"
VALIDATION_SHARE = 0.2
MOST_VALIDATION_ROWS = 2000
LEAST_OF_A_KIND = 20
# Areas of two models on the same rows go up and down together: the standard error of their
# difference is about half of that of one area where they correlate by 0.9.
GAIN_IN_ERRORS = 0.5
# Shares of the recipe's steps, and how many candidates go on after each but the last.
BUDGETS = (0.1, 0.3)
KEEP = (2,)


class Candidate(NamedTuple):
    """A loss that may be chosen."""

    q: float | QSchedule
    gamma: float


STANDARD = Candidate(*CROSS_ENTROPY)
CANDIDATES = (
    STANDARD,
    Candidate(0.3, 0.0),
    Candidate(0.7, 0.0),
    Candidate(0.0, 1.0),
    Candidate(0.3, 1.0),
    Candidate(1.0, 1.0),
    Candidate(-0.3, 0.0),
    # What is far wrong first, then cross-entropy.
    Candidate(QSchedule(start=-1.0, end=0.0, over=0.5), 0.0),
)
FitAndScore = Callable[[float | QSchedule, float, float], float]


def _plain(q: float | QSchedule) -> float | dict[str, float]:
    return q.model_dump() if isinstance(q, QSchedule) else q


class InnerSplit(NamedTuple):
    """The training rows, split once more."""

    train: list[Row]
    validation: list[Row]

    def counts(self) -> dict[str, int]:
        """Returns the rows of `train`, and the `refused` and `answered` ones of `validation`."""
        refused = sum(row.category is not None for row in self.validation)
        answered = len(self.validation) - refused
        return {"train": len(self.train), "refused": refused, "answered": answered}


class Trial(NamedTuple):
    """One short training.

    Attributes:
        share: Of the recipe's steps.
        score: More is better. Minus infinity where the score was not a number.
        kept: Whether the candidate went on; after the last round, whether it was chosen.
    """

    candidate: Candidate
    share: float
    score: float
    kept: bool


class LossChoice(NamedTuple):
    """What `auto` chose, and from which trainings.

    Attributes:
        trials: All trainings, round by round, in the order of the candidates.
        least_gain: What a member had to exceed cross-entropy's score by.
    """

    best: Candidate
    trials: tuple[Trial, ...]
    reason: str
    rows: dict[str, int]
    seed: int
    least_gain: float

    @property
    def cost(self) -> float:
        """The sum of all shares: the search in trainings."""
        return sum(trial.share for trial in self.trials)

    def to_json(self) -> str:
        """Returns what `loss_choice.json` holds."""
        record = {
            "q": _plain(self.best.q),
            "gamma": self.best.gamma,
            "reason": self.reason,
            "criterion": CRITERION,
            "seed": self.seed,
            "rows": self.rows,
            "least_gain": self.least_gain,
            "cost_in_trainings": round(self.cost, 6),
            "trials": [
                {
                    "q": _plain(trial.candidate.q),
                    "gamma": trial.candidate.gamma,
                    "share_of_steps": trial.share,
                    "score": trial.score if math.isfinite(trial.score) else None,
                    "kept": trial.kept,
                }
                for trial in self.trials
            ],
        }
        return json.dumps(record, indent=2) + "\n"


def is_auto(config: LossConfig) -> bool:
    """Returns whether q and gamma of the decision loss are still to be chosen."""
    return AUTO in (config.decision.q, config.decision.gamma)


def with_choice(loss: LossConfig, choice: Candidate) -> LossConfig:
    """Returns the losses with `auto` replaced by what was chosen."""
    decision = loss.decision.model_copy(update={"q": choice.q, "gamma": choice.gamma})
    return loss.model_copy(update={"decision": decision})


def read_choice(folder: Path) -> Candidate | None:
    """Returns what a run chose before it was killed; None where it had not."""
    path = folder / CHOICE_NAME
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    q = record["q"]
    return Candidate(QSchedule(**q) if isinstance(q, dict) else q, record["gamma"])


# --- the search -----------------------------------------------------------------------------------


def search(config: TrainConfig, start: Start, rows: Sequence[Row], folder: Path) -> LossChoice:
    """Chooses q and gamma of the decision loss from the training rows alone.

    Raises:
        ConfigError: The rows are too few to choose by, or those that are too long leave only
            refused or only answered ones to compare on.
    """
    split = inner_split(rows, config.seed)
    return choose_loss(_fit_and_score(config, start, split, folder), split, seed=config.seed)


def _fit_and_score(
    config: TrainConfig, start: Start, split: InnerSplit, folder: Path
) -> FitAndScore:
    """Returns a function that trains shortly and tells how well the decisions are ranked.

    Every training begins with the same weights, sees the same rows in the same order, and is a
    whole one: its learning rate warms up and falls.
    """
    from training.measure.monitor import DecisionMonitor
    from training.run.assembly import SILENT, assemble, memory_errors_explained

    longest, too_long = config.optimisation.max_length, config.data.too_long
    tokens = (start.tokenizer, start.manifest)
    weights = decision_weights(split.train, config.data, config.loss)
    examples = encode_rows(split.train, *tokens, weights, longest, too_long)
    monitor = DecisionMonitor(
        split.validation, *tokens, max_length=longest, too_long=too_long, text_rows=0
    )
    if SCORE not in monitor.metric_names():
        raise ConfigError(
            "loss.decision.q: auto compares refused with answered rows, and of one kind all that "
            "were set aside are too long; raise optimisation.max_length, or give q and gamma"
        )

    def score(q: float | QSchedule, gamma: float, share: float) -> float:
        loss = with_choice(config.loss, Candidate(q, gamma))
        trainer = assemble(config, start, examples, loss, folder, SILENT, share=share)
        with memory_errors_explained():
            trainer.train()
        return monitor.measure(trainer.model).metrics[SCORE]

    return score


def choose_loss(
    fit_and_score: FitAndScore,
    split: InnerSplit,
    *,
    seed: int,
    candidates: Sequence[Candidate] = CANDIDATES,
) -> LossChoice:
    """Chooses the member of the family whose short trainings decide best.

    Cross-entropy is compared to the end, and stays unless another is better by more than
    `GAIN_IN_ERRORS` times the standard error of its area: less is as likely chance. Among equal
    scores the earlier candidate is the better one.

    Args:
        fit_and_score: Of q, gamma and a share of the steps: trains on `split.train`, and returns
            `CRITERION`. The same seed and the same order of rows for every member.
        candidates: What may be chosen, all different, `STANDARD` among them.
    """
    if STANDARD not in candidates:
        raise ValueError("the candidates must include cross-entropy")
    rows = split.counts()
    left = list(candidates)
    trials: list[Trial] = []
    least_gain, reason = 0.0, ""
    for share, keep in zip(BUDGETS, (*KEEP, None), strict=True):
        measured = [fit_and_score(*candidate, share) for candidate in left]
        scores = [score if math.isfinite(score) else -math.inf for score in measured]
        ranked = sorted(range(len(left)), key=scores.__getitem__, reverse=True)
        standard = left.index(STANDARD)
        if keep is not None:
            kept = {*ranked[:keep], standard}
        else:
            error = area_error(scores[standard], rows["refused"], rows["answered"])
            least_gain = GAIN_IN_ERRORS * error
            winner, reason = _winner(scores, ranked[0], standard, least_gain)
            kept = {winner}
        trials += [Trial(c, share, scores[at], at in kept) for at, c in enumerate(left)]
        left = [candidate for at, candidate in enumerate(left) if at in kept]
    return LossChoice(left[0], tuple(trials), reason, rows, seed, least_gain)


def _winner(
    scores: Sequence[float], best: int, standard: int, least_gain: float
) -> tuple[int, str]:
    """Returns the winner's place in the last round, and why it is that one."""
    if scores[best] == -math.inf:
        return standard, "no candidate gave a score"
    if scores[standard] == -math.inf:
        return best, f"it has the best score of the last rung, {scores[best]:.6g}"
    gain = scores[best] - scores[standard]
    if gain > least_gain:
        return best, (
            f"its score of {scores[best]:.6g} is {gain:.3g} above the standard's, more than the "
            f"{least_gain:.3g} asked for"
        )
    return standard, (
        f"the standard's score is {scores[standard]:.6g}; the best one is {gain:.3g} above it, not "
        f"more than the {least_gain:.3g} asked for"
    )


def area_error(area: float, refused: int, answered: int) -> float:
    """Returns the standard error of an area under the ROC curve; 0 if it is not finite.

    Source:
        Hanley and McNeil, The Meaning and Use of the Area under a Receiver Operating Characteristic
        (ROC) Curve, Radiology 143, 1982.
    """
    if not (math.isfinite(area) and refused and answered):
        return 0.0
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area)
    variance += (refused - 1) * (first - area**2) + (answered - 1) * (second - area**2)
    return math.sqrt(max(variance, 0.0) / (refused * answered))


# --- the inner split ------------------------------------------------------------------------------


def inner_split(rows: Sequence[Row], seed: int) -> InnerSplit:
    """Sets a part of the training rows aside, the same share of every category.

    Rows that share a pair or a prompt, also an earlier turn's, stay on one side. Prompts that are
    both refused and answered say nothing about a decision: they are not in the validation part.

    At most `MOST_VALIDATION_ROWS` are set aside.

    Raises:
        ConfigError: Fewer than `LEAST_OF_A_KIND` refused or answered rows were set aside.
    """
    share = min(VALIDATION_SHARE, MOST_VALIDATION_ROWS / max(len(rows), 1))
    held_out = _draw(_groups(rows), rows, share, random.Random(seed))
    decisions: dict[Hashable, set[bool]] = defaultdict(set)
    for row in rows:
        decisions[conversation_key(row.prompt)].add(row.category is None)
    split = InnerSplit(
        [row for at, row in enumerate(rows) if at not in held_out],
        [
            rows[at]
            for at in sorted(held_out)
            if len(decisions[conversation_key(rows[at].prompt)]) == 1
        ],
    )
    _, refused, answered = split.counts().values()
    if min(refused, answered) < LEAST_OF_A_KIND:
        raise ConfigError(
            f"loss.decision: auto compares losses on training rows that it sets aside, at least "
            f"{LEAST_OF_A_KIND} refused and {LEAST_OF_A_KIND} answered ones; of these {len(rows)} "
            f"rows it could set aside {refused} and {answered}: add rows, or give q and gamma "
            "numbers"
        )
    return split


def _groups(rows: Sequence[Row]) -> list[list[int]]:
    """Returns the places of rows that must stay together, in the order of their first one."""
    links = [(at, key) for at, row in enumerate(rows) for key in _keys(row)]
    node_of = {key: len(rows) + n for n, key in enumerate(dict.fromkeys(k for _, k in links))}
    nodes = len(rows) + len(node_of)
    ends = ([at for at, _ in links], [node_of[key] for _, key in links])
    graph = coo_array((np.ones(len(links)), ends), shape=(nodes, nodes))
    labels = connected_components(graph, directed=False)[1][: len(rows)]
    groups: dict[int, list[int]] = defaultdict(list)
    for at, label in enumerate(labels.tolist()):
        groups[label].append(at)
    return list(groups.values())


def _keys(row: Row) -> Iterable[Hashable]:
    if row.pair is not None:
        yield ("pair", row.pair)
    for at, turn in enumerate(row.messages):
        if turn.role == "assistant":
            yield conversation_key(row.messages[:at])


def _draw(
    groups: Sequence[Sequence[int]], rows: Sequence[Row], share: float, source: random.Random
) -> set[int]:
    strata: dict[tuple[str, ...], list[Sequence[int]]] = defaultdict(list)
    for group in groups:
        strata[tuple(sorted({rows[at].category or "" for at in group}))].append(group)
    drawn: set[int] = set()
    for kind in sorted(strata):
        alike = strata[kind]
        room = math.ceil(share * sum(map(len, alike)))
        for group in source.sample(alike, len(alike)):
            if len(group) <= room:
                drawn.update(group)
                room -= len(group)
    return drawn
