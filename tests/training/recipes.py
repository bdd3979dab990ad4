"""A tiny recipe for tests of the training run, and how its results are read."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models.checkpoint import load_tokenizer
from training.config.recipe import TrainConfig

MODEL = {
    "vocab_size": 400,
    "hidden_size": 64,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 128,
    "max_length": 64,
}
OPTIMISATION = {
    "epochs": 5,
    "batch_size": 8,
    "learning_rate": 0.003,
    "max_length": 64,
}
CATEGORIES = {"safety": "harms", "humanizing": "takes it for a person"}
LOSSES = ("loss", "decision_loss", "text_loss", "grad_norm", "learning_rate")


def tiny_config(data: Path, **changes: Any) -> TrainConfig:
    """Returns a recipe of some 20 steps; `optimisation` is changed field by field."""
    optimisation = OPTIMISATION | changes.pop("optimisation", {})
    values = {
        "name": "small",
        "seed": 1,
        "model": MODEL,
        "data": {"train": [str(data)]},
        "categories": CATEGORIES,
        "optimisation": optimisation,
    }
    return TrainConfig.model_validate({**values, **changes})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[tuple[float, ...]]:
    """Returns step, loss, its parts, gradient norm and learning rate of each line of the log."""
    return [
        (line["step"], *(line[name] for name in LOSSES))
        for line in log_of(folder)
        if "loss" in line
    ]


def decision_logits(folder: Path, question: str) -> torch.Tensor:
    """Returns transformers' logits at the decision step of one question; ``[vocabulary]``."""
    prompt: Any = load_tokenizer(folder).apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(**prompt).logits[0, -1]
    return logits
