"""The way `tokens`: only the output rows of the control tokens are learnt, nothing is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.checkpoint import load_checkpoint
from models.errors import ConfigError
from models.manifest import Manifest
from training.config.recipe import TrainConfig
from training.data.encoding import Example, encode_rows
from training.data.mixture import decision_weights
from training.data.rows import Row
from training.measure.metrics import decision_metrics
from training.model.gguf import cache_folder
from training.model.output_rows import on_device, set_row
from training.model.start import Start
from training.model.states import decision_states
from training.model.token_rows import Decisions, Fit, Floats, fit
from training.run.export import write_weights
from training.run.kept_states import keep_states


class Prompt(NamedTuple):
    """A prompt as the server decides on it: without the control tokens of earlier turns.

    Attributes:
        ids: Its tokens.
        label: Column of the right category, the number of categories for an answer.
        weight: What the decision counts.
    """

    ids: list[int]
    label: int
    weight: float


def prompts_of(example: Example, manifest: Manifest) -> list[Prompt]:
    """Returns a prompt for every assistant turn of a row."""
    columns = {token: column for column, token in enumerate(manifest.control_ids)}
    before: list[int] = []
    prompts: list[Prompt] = []
    for token, weight in zip(example.input_ids, example.weights, strict=True):
        if token in columns:
            prompts.append(Prompt(list(before), columns[token], weight))
        else:
            before.append(token)
    return prompts


def learn_tokens(
    config: TrainConfig,
    start: Start,
    rows: Sequence[Row],
    held_out: Sequence[Row] | None,
    folder: Path,
) -> list[dict[str, Any]]:
    """Learns the rows, and writes the checkpoint and what it was learnt from.

    Args:
        config: The recipe.
        start: What it begins with.
        rows: What is learnt from.
        held_out: What is measured on; None measures nothing.
        folder: It holds the manifest and the tokenizer already.

    Returns:
        The lines of the log.

    Raises:
        ConfigError: A row cannot be encoded, or there are too few.
        CheckpointError: What was written could not be served.
    """
    model = on_device(start.make())
    examples = _encoded(config, start, rows, config.optimisation.max_length)
    decisions = decisions_of(examples, start.manifest, model)
    fitted = fit(decisions, len(start.manifest.categories), config.seed)
    lines: list[dict[str, Any]] = [_told(decisions, fitted)]
    if held_out is not None:
        # Whole, as the server would read them.
        whole = _encoded(config, start, held_out, None)
        measured = decisions_of(whole, start.manifest, model, last_turns=True)
        lines.append({"final": _metrics(measured, fitted.rows, start.manifest, held_out)})
    for category, row in zip(start.manifest.categories, fitted.rows, strict=True):
        set_row(model, category.id, row)
    set_row(model, start.manifest.respond.id, np.zeros_like(fitted.rows[0]))
    save_model(model, start.dtype, folder)
    keep_states(folder, decisions, start.manifest.names)
    load_checkpoint(folder)
    return lines


def decisions_of(
    examples: Sequence[Example], manifest: Manifest, model: Any, *, last_turns: bool = False
) -> Decisions:
    """Returns the decisions of rows: every assistant turn's, or the last one's of each row."""
    turns = [prompts_of(example, manifest) for example in examples]
    prompts = [prompt for of_row in turns for prompt in (of_row[-1:] if last_turns else of_row)]
    states = decision_states(
        model, [prompt.ids for prompt in prompts], manifest.control_ids, cache_folder("states")
    )
    return Decisions(
        states.astype(np.float64),
        np.array([prompt.label for prompt in prompts]),
        np.array([prompt.weight for prompt in prompts]),
    )


def _encoded(
    config: TrainConfig, start: Start, rows: Sequence[Row], max_length: int | None
) -> list[Example]:
    weights = decision_weights(rows, config.data, config.loss)
    tokenizer, manifest = start.tokenizer, start.manifest
    return encode_rows(rows, tokenizer, manifest, weights, max_length, config.data.too_long)


def save_model(model: Any, dtype: str, folder: Path) -> None:
    """Writes the weights as the base stores its own."""
    import torch

    model.to(getattr(torch, dtype))
    write_weights(model, folder)


def _told(decisions: Decisions, fitted: Fit) -> dict[str, Any]:
    losses = {f"{strength:.3g}": round(loss, 4) for strength, loss in fitted.losses.items()}
    return {
        "decisions": len(decisions.labels),
        "strength": fitted.strength,
        "cross_validated_loss": losses,
    }


def _metrics(
    decisions: Decisions, rows: Floats, manifest: Manifest, measured: Sequence[Row]
) -> dict[str, float]:
    truth = [*manifest.names, None]
    return decision_metrics(
        decisions.states @ rows.T,
        [truth[label] for label in decisions.labels],
        manifest.names,
        [row.near_miss for row in measured],
    )


def check_one_process(count: int) -> None:
    """Holds that nobody waits for a share of the work.

    Raises:
        ConfigError: There are several processes.
    """
    if count > 1:
        raise ConfigError("train: tokens runs in one process; start it without a launcher")
