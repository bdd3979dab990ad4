"""From a trained model to an ordinary checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.checkpoint import load_checkpoint
from models.errors import EvaluationError
from training.model.start import Start
from training.run.processes import Processes
from training.run.resume import saved_silently

# In a folder of its own: `*.safetensors` beside the weights would count as weights.
ADAPTER = "adapter"


def export(trainer: Any, start: Start, folder: Path, processes: Processes) -> None:
    """Writes the weights; adapters are merged into them, and kept in a folder of their own.

    Args:
        trainer: After the training. Its model is changed.
        processes: All of them call this; the first one writes.

    Raises:
        CheckpointError: What was written could not be served.
        EvaluationError: A weight is not finite.
    """
    if processes.is_main and hasattr(trainer.model, "peft_config"):
        with saved_silently():
            trainer.model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    model, weights = plain_model(trainer)
    import torch

    _check_finite(model.state_dict() if weights is None else weights)

    dtype = getattr(torch, start.dtype)
    # Off for the training; kept so, whoever loads it would generate without a cache.
    model.config.use_cache = True
    if weights is None:
        # In every process: they may share a measurement of it.
        model.to(dtype)
    else:
        weights = {name: value.to(dtype) for name, value in weights.items()}
        model.config.dtype = dtype
    if processes.is_main:
        write_weights(model, folder, weights)
        load_checkpoint(folder)
    processes.wait()


def write_weights(model: Any, folder: Path, weights: Mapping[str, Any] | None = None) -> None:
    """Writes a model for everybody who may read its configuration.

    Args:
        model: Of transformers.
        folder: Where it goes.
        weights: In the place of the model's own.
    """
    with saved_silently():
        model.save_pretrained(folder, state_dict=weights)
    # safetensors lets only the owner read its files; a container's user is another one.
    mode = (folder / "config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _check_finite(weights: Mapping[str, Any]) -> None:
    """Rejects the weights of a training that diverged without being measured."""
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise EvaluationError(
                f"{name} is not finite: the training has diverged; lower "
                "optimisation.learning_rate or use bf16: false"
            )


def plain_model(trainer: Any) -> tuple[Any, dict[str, Any] | None]:
    """Returns the model without wrappers and adapters.

    Returns:
        The model, and its gathered weights where FSDP had spread them; None where the model holds
        them itself.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        weights = trainer.accelerator.get_state_dict(trainer.model)
        return trainer.accelerator.unwrap_model(trainer.model), weights
    model = trainer.model
    if hasattr(model, "merge_and_unload"):
        from training.model.lora import merge

        model = trainer.model = merge(model)
    return model, None
