"""Low-rank adapters: put on before the training, merged into the weights after it."""

from collections.abc import Sequence
from typing import Any

from models.errors import ConfigError
from models.manifest import Manifest
from training.config.recipe import LoraConfig


def add_adapters(model: Any, config: LoraConfig, manifest: Manifest) -> Any:
    """Freezes a model and gives it adapters; the control tokens' rows are trained as they are.

    Raises:
        ConfigError: A target names no linear layer, or the output layer.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    targets = config.target_modules
    if targets != "all-linear":
        _check_targets(model, targets)
    adapters = PeftConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        trainable_token_indices=dict.fromkeys(_vocabulary_layers(model), manifest.control_ids),
        task_type="CAUSAL_LM",
    )
    # With a name PEFT would ask the hub, at every resume point, what the vocabulary once was.
    model.name_or_path = ""
    return get_peft_model(model, adapters)


def merge(model: Any) -> Any:
    """Returns the plain model whose weights hold what the adapters learnt."""
    return model.merge_and_unload()


def _vocabulary_layers(model: Any) -> list[str]:
    """Names the layers with a row for each token; tied ones count once."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding]
    if head is not None and head.weight is not embedding.weight:
        layers.append(head)
    return [
        name.rpartition(".")[2]
        for layer in layers
        for name, module in model.named_modules()
        if module is layer
    ]


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    from torch import nn

    output = model.get_output_embeddings()
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not output
        }
    )
    for target in targets:
        if target.rpartition(".")[2] not in linear:
            raise ConfigError(
                f"lora.target_modules: {target!r} is no linear layer of this model that can have "
                f"an adapter; it has {', '.join(linear)}"
            )
