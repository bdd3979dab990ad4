"""What a training is measured on, read and checked before any time is spent on the training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError
from models.manifest import Manifest
from training.config.recipe import EvaluationConfig, TrainConfig
from training.data.mixture import evaluation_rows
from training.data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from training.measure.monitor import DecisionMonitor

# They compare rows to refuse with rows to answer; the other metrics need rows of any kind.
COMPARING = ("auc", "refused_at_5")


def held_out_rows(config: TrainConfig) -> list[Row] | None:
    """Reads the rows of `evaluation.data`; None where the recipe has nothing measured.

    Raises:
        ConfigError: A source cannot be read, rows are wrong, or they cannot tell the metric that
            chooses the best weights.
    """
    evaluation = config.evaluation
    if evaluation is None:
        return None
    rows = evaluation_rows(
        evaluation.data,
        list(config.categories),
        limit=evaluation.rows,
        seed=config.data.seed,
        single_token=config.single_token,
    )
    _check_best(rows, evaluation)
    return rows


def _check_best(rows: Sequence[Row], evaluation: EvaluationConfig) -> None:
    refused = sum(row.category is not None for row in rows)
    kinds = {"to be refused": refused, "to be answered": len(rows) - refused}
    lacking = " or ".join(kind for kind, count in kinds.items() if not count)
    if lacking and evaluation.best in COMPARING:
        raise ConfigError(
            f"evaluation.best: {evaluation.best} cannot be told from evaluation.data: it needs "
            "rows that are to be refused and rows that are to be answered, and none is "
            f"{lacking}; add such rows, or set evaluation.best to last"
        )


def held_out_monitor(
    config: TrainConfig,
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    manifest: Manifest,
    described: Any,
) -> "DecisionMonitor":
    """Encodes what is measured on.

    Args:
        described: The model's configuration. Prompts are measured whole where the model can.

    Raises:
        ConfigError: A row cannot be encoded or is too long, or those that are not left out as too
            long cannot tell the metric that chooses the best weights.
    """
    from training.measure.monitor import DecisionMonitor

    assert config.evaluation is not None
    own: int | None = getattr(described, "max_position_embeddings", None)
    monitor = DecisionMonitor(
        rows,
        tokenizer,
        manifest,
        max_length=max(config.optimisation.max_length, own or 0),
        too_long=config.data.too_long,
        batch_size=config.optimisation.batch_size,
        seed=config.seed,
    )
    _check_best(monitor.rows, config.evaluation)
    return monitor
