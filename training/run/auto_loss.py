"""`auto`: q and gamma of the decision loss, chosen from the training data alone.

The training rows are split once more, and members of the family, one of them on a schedule, are
tried on the inner training part by successive halving. What is compared is the area under the ROC
curve of the decisions on the inner validation part, refused against answered:

* It belongs to none of the losses. Log-loss is what cross-entropy itself minimises, and it measures
  calibration, which differs by q and which the dials' calibration repairs afterwards.
* It keeps its order where labels are wrong at random. If a share a of the rows labelled refused and
  a share b of those labelled answered should be the other, the expected area is
  1/2 + (1 - a - b)(clean area - 1/2): up to chance, the best member on noisy rows is the best on
  clean ones. Log-loss has no such property.

Evaluation data play no part.

Source:
    Menon, van Rooyen, Ong, Williamson: Learning from Corrupted Binary Labels via
    Class-Probability Estimation, ICML 2015.
"""

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import NamedTuple

from loss.members import CROSS_ENTROPY
from models.errors import ConfigError
from training.config.loss import AUTO, LossConfig, QSchedule
from training.data.rows import Message, Row
from training.run.halving import Choice, Plan, successive_halving

CHOICE_NAME = "loss_choice.json"
CRITERION = "area under the ROC curve, refused against answered, on the inner validation rows"
VALIDATION_SHARE = 0.2
MOST_VALIDATION_ROWS = 2000
LEAST_OF_A_KIND = 20
# Areas of two models on the same rows go up and down together: the standard error of their
# difference is about half of that of one area where they correlate by 0.9.
GAIN_IN_ERRORS = 0.5
BUDGETS = (0.1, 0.3)
KEEP = (2,)


class Candidate(NamedTuple):
    """A loss that may be chosen.

    Attributes:
        q: See loss/flexible.py.
        gamma: As `q`.
    """

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


class InnerSplit(NamedTuple):
    """The training rows, split once more.

    Attributes:
        train: What the candidates are trained on.
        validation: What they are compared on.
    """

    train: list[Row]
    validation: list[Row]


class LossChoice(NamedTuple):
    """What `auto` came to.

    Attributes:
        search: Winner, trials and reason.
        rows: How many: `train`, and of the inner validation part `refused` and `answered`.
        seed: Of the inner split.
        least_gain: What a member had to exceed cross-entropy's score by.
    """

    search: Choice[Candidate]
    rows: dict[str, int]
    seed: int
    least_gain: float

    def to_json(self) -> str:
        """Returns what `loss_choice.json` holds."""
        search = self.search
        record = {
            "q": _told(search.best.q),
            "gamma": search.best.gamma,
            "reason": search.reason,
            "criterion": CRITERION,
            "seed": self.seed,
            "rows": self.rows,
            "least_gain": self.least_gain,
            "cost_in_trainings": round(search.cost, 6),
            "trials": [
                {
                    "q": _told(trial.candidate.q),
                    "gamma": trial.candidate.gamma,
                    "share_of_steps": trial.budget,
                    "score": trial.score if math.isfinite(trial.score) else None,
                    "kept": trial.kept,
                }
                for rung in search.rungs
                for trial in rung
            ],
        }
        return json.dumps(record, indent=2) + "\n"


def _told(q: float | QSchedule) -> float | dict[str, float]:
    return q.model_dump() if isinstance(q, QSchedule) else q


def is_auto(config: LossConfig) -> bool:
    """Returns whether q and gamma of the decision loss are still to be chosen."""
    return AUTO in (config.decision.q, config.decision.gamma)


def choose_loss(
    fit_and_score: FitAndScore,
    split: InnerSplit,
    *,
    seed: int,
    candidates: Sequence[Candidate] = CANDIDATES,
    budgets: Sequence[float] = BUDGETS,
    keep: Sequence[int] = KEEP,
) -> LossChoice:
    """Chooses the member of the family whose short trainings decide best.

    Cross-entropy is compared to the end, and stays unless another is better by more than
    `GAIN_IN_ERRORS` times the standard error of its area: less is as likely chance.

    Args:
        fit_and_score: Of q, gamma and a share of the steps: trains on `split.train`, and returns
            `CRITERION`. The same seed and the same order of rows for every member.
        split: What `inner_split` returned.
        seed: What the split was made with; recorded.
        candidates: What may be chosen, `STANDARD` among them.
        budgets: Shares of the steps, rising.
        keep: How many go on after each budget but the last.

    Raises:
        ValueError: Cross-entropy is missing, or see `successive_halving`.
    """
    if STANDARD not in candidates:
        raise ValueError("the candidates must include cross-entropy")
    refused = sum(row.category is not None for row in split.validation)
    answered = len(split.validation) - refused

    def least_gain(area: float) -> float:
        return GAIN_IN_ERRORS * area_error(area, refused, answered)

    search = successive_halving(
        candidates,
        lambda candidate, share: fit_and_score(candidate.q, candidate.gamma, share),
        Plan(tuple(budgets), tuple(keep), (STANDARD.__eq__,), least_gain=least_gain),
    )
    counts = {"train": len(split.train), "refused": refused, "answered": answered}
    standard = next(t.score for t in search.rungs[-1] if t.candidate == STANDARD)
    return LossChoice(search, counts, seed, least_gain(standard))


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


def inner_split(rows: Sequence[Row], seed: int, share: float = VALIDATION_SHARE) -> InnerSplit:
    """Sets a part of the training rows aside, the same share of every category.

    Rows that share a pair or a prompt, also an earlier turn's, stay on one side. Prompts that are
    both refused and answered say nothing about a decision: they are not in the validation part.

    Args:
        rows: The training rows.
        seed: Of the draw.
        share: Of the rows set aside; at most `MOST_VALIDATION_ROWS` of them.

    Returns:
        Both parts, in the order of `rows`.

    Raises:
        ConfigError: Fewer than `LEAST_OF_A_KIND` refused or answered rows were set aside.
    """
    share = min(share, MOST_VALIDATION_ROWS / max(len(rows), 1))
    held_out = _draw(_groups(rows), rows, share, random.Random(seed))
    categories: dict[Hashable, set[bool]] = defaultdict(set)
    for row in rows:
        categories[_as_key(row.prompt)].add(row.category is None)
    split = InnerSplit(
        [row for at, row in enumerate(rows) if at not in held_out],
        [rows[at] for at in sorted(held_out) if len(categories[_as_key(rows[at].prompt)]) == 1],
    )
    refused = sum(row.category is not None for row in split.validation)
    answered = len(split.validation) - refused
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
    leader = list(range(len(rows)))

    def find(at: int) -> int:
        while leader[at] != at:
            leader[at] = leader[leader[at]]
            at = leader[at]
        return at

    first: dict[Hashable, int] = {}
    for at, row in enumerate(rows):
        for key in _keys(row):
            one, other = find(first.setdefault(key, at)), find(at)
            leader[max(one, other)] = min(one, other)
    groups: dict[int, list[int]] = defaultdict(list)
    for at in range(len(rows)):
        groups[find(at)].append(at)
    return list(groups.values())


def _keys(row: Row) -> Iterable[Hashable]:
    if row.pair is not None:
        yield ("pair", row.pair)
    for at, turn in enumerate(row.messages):
        if turn.role == "assistant":
            yield _as_key(row.messages[:at])


def _as_key(turns: Iterable[Message]) -> Hashable:
    """Returns what a conversation says, but for case and white space."""
    return tuple((turn.role, " ".join(turn.content.casefold().split())) for turn in turns)


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
