"""What a run writes about itself beside the weights."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from models.files import write_atomically
from models.manifest import Recipe, save_manifest
from training.config.data import Origin
from training.config.loss import GammaSchedule, LossConfig, QSchedule
from training.config.recipe import TrainConfig
from training.data.sources import identify
from training.demo_data.render import as_json_lines, render
from training.model.start import Start

LOG_NAME = "training_log.jsonl"
CONFIG_NAME = "resolved_config.yaml"
CROSS_ENTROPY = "cross_entropy"

Setting = float | QSchedule | GammaSchedule | dict[str, float] | str


def data_hashes(config: TrainConfig) -> dict[str, str]:
    """Returns what tells this state of the training data, by name."""
    hashes: dict[str, str] = {}
    asked: list[tuple[Origin, str]] = [(config.data.train, "train")]
    if config.evaluation is not None:
        asked.append((config.evaluation.data, "calibration"))
    for origin, split in asked:
        if isinstance(origin, str):
            rows = as_json_lines(render(config.data.seed)[split])
            hashes[f"demo_data/{split}.jsonl"] = hashlib.sha256(rows).hexdigest()
            continue
        for source in origin:
            hashes |= identify(source)
    return hashes


def recipe_of(config: TrainConfig, hashes: dict[str, str], loss: LossConfig) -> Recipe:
    """Returns what the manifest says of the recipe."""
    return Recipe(
        config_sha256=config.sha256(),
        data_sha256=hashes,
        loss=describe_loss(loss),
        seed=config.seed,
    )


def describe_loss(loss: LossConfig) -> str:
    """Returns a loss in one line, such as `flexible(decision q=0.3 gamma=1, text q=0 gamma=0)`."""
    settings = (loss.decision.q, loss.decision.gamma, loss.text.q, loss.text.gamma)
    if all(isinstance(setting, float) and setting == 0 for setting in settings):
        return CROSS_ENTROPY
    decision_q, decision_gamma, text_q, text_gamma = map(_described, settings)
    return (
        f"flexible(decision q={decision_q} gamma={decision_gamma}, "
        f"text q={text_q} gamma={text_gamma})"
    )


def _described(setting: Setting) -> str:
    if isinstance(setting, (QSchedule, GammaSchedule)):
        return f"{setting.start:g} to {setting.end:g} over {setting.over:g}"
    if isinstance(setting, dict):
        return "{" + ", ".join(f"{name}: {value:g}" for name, value in setting.items()) + "}"
    return setting if isinstance(setting, str) else f"{setting:g}"


def write_contract(folder: Path, config: TrainConfig, recipe: Recipe, start: Start) -> None:
    """Writes manifest, tokenizer, model configuration and the resolved recipe."""
    categories = tuple(
        category.model_copy(
            update={
                "refusal_text": config.refusal_text(category.name),
                "refusal_prefix": config.refusal_prefixes.get(category.name),
            }
        )
        for category in start.manifest.categories
    )
    start.config.save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    write_atomically(folder / CONFIG_NAME, config.to_yaml())
    save_manifest(
        folder,
        start.manifest.model_copy(
            update={
                "categories": categories,
                "recipe": recipe,
                "kept": config.train != "tokens",
            }
        ),
    )


def write_log(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes the training's log, one JSON object a line."""
    lines: Sequence[str] = [json.dumps(entry) + "\n" for entry in entries]
    write_atomically(folder / LOG_NAME, "".join(lines))
