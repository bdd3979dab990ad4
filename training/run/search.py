"""Short trainings for `auto`: what a member of the loss family scores on the inner rows."""

import json
from collections.abc import Sequence
from pathlib import Path

from models.errors import ConfigError
from training.config.loss import LossConfig, QSchedule
from training.config.recipe import TrainConfig
from training.data.encoding import DecisionWeights, Row, encode_rows
from training.data.mixture import decision_weights
from training.measure.monitor import DecisionMonitor
from training.model.start import Start
from training.run.assembly import SILENT, assemble, memory_told
from training.run.auto_loss import (
    CHOICE_NAME,
    Candidate,
    FitAndScore,
    InnerSplit,
    LossChoice,
    choose_loss,
    inner_split,
)

SCORE = "auc"


def search(config: TrainConfig, start: Start, rows: Sequence[Row], folder: Path) -> LossChoice:
    """Chooses q and gamma of the decision loss from the training rows alone.

    Args:
        config: The recipe.
        start: What it begins with.
        rows: The training rows.
        folder: Where trainers may write.

    Raises:
        ConfigError: The rows are too few to choose by.
    """
    split = inner_split(rows, config.seed)
    weights = decision_weights(split.train, config.data, config.loss)
    score = fit_and_score(config, start, split, weights, folder)
    return choose_loss(score, split, seed=config.seed)


def read_choice(folder: Path) -> Candidate | None:
    """Returns what a run chose before it was killed; None where it had not."""
    path = folder / CHOICE_NAME
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    q = record["q"]
    return Candidate(QSchedule(**q) if isinstance(q, dict) else q, record["gamma"])


def with_choice(loss: LossConfig, choice: Candidate) -> LossConfig:
    """Returns the losses with `auto` replaced by what was chosen."""
    decision = loss.decision.model_copy(update={"q": choice.q, "gamma": choice.gamma})
    return loss.model_copy(update={"decision": decision})


def fit_and_score(
    config: TrainConfig, start: Start, split: InnerSplit, weights: DecisionWeights, folder: Path
) -> FitAndScore:
    """Returns a function that trains shortly and tells how well the decisions are ranked.

    Every training begins with the same weights, sees the same rows in the same order, and is a
    whole one: its learning rate warms up and falls.

    Args:
        config: The recipe.
        start: What it begins with.
        split: What is trained on and what is measured on.
        weights: Loss weights.
        folder: Where a trainer may write.

    Returns:
        A function of q, gamma and the share of the recipe's steps.

    Raises:
        ConfigError: Rows that are too long leave only refused or only answered ones to compare on.
    """
    chosen = config.optimisation
    examples = encode_rows(
        split.train,
        start.tokenizer,
        start.manifest,
        weights,
        chosen.max_length,
        config.data.too_long,
    )
    monitor = DecisionMonitor(
        split.validation,
        start.tokenizer,
        start.manifest,
        max_length=chosen.max_length,
        too_long=config.data.too_long,
        text_rows=0,
    )
    if SCORE not in monitor.metric_names():
        raise ConfigError(
            "loss.decision.q: auto compares refused with answered rows, and of one kind all that "
            "were set aside are too long; raise optimisation.max_length, or give q and gamma"
        )

    def score(q: float | QSchedule, gamma: float, share: float) -> float:
        decision = config.loss.decision.model_copy(update={"q": q, "gamma": gamma})
        loss = config.loss.model_copy(update={"decision": decision})
        trainer = assemble(config, start, examples, loss, folder, SILENT, share=share)
        with memory_told():
            trainer.train()
        return monitor.measure(trainer.model).metrics[SCORE]

    return score
