"""The trained weights in the middle of a run: kept aside and put back."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE_NAME = "trained.safetensors"


@contextmanager
def saved_silently() -> Iterator[None]:
    """Keeps transformers' bar for the shards it writes out of the training's own."""
    from transformers.utils import logging

    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def save_trained(trainer: Any, folder: Path) -> None:
    """Writes the parameters that are trained; all processes call it."""
    if trainer.is_fsdp_enabled:
        from accelerate.utils import save_fsdp_model

        plugin = trainer.accelerator.state.fsdp_plugin
        save_fsdp_model(plugin, trainer.accelerator, trainer.model, str(folder))
    elif trainer.is_world_process_zero():
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        trained = {
            name: parameter.detach().contiguous()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }
        save_file(trained, folder / FILE_NAME)
    trainer.accelerator.wait_for_everyone()


def load_trained(trainer: Any, folder: Path) -> None:
    """Puts back what `save_trained` wrote; all processes call it.

    Raises:
        KeyError: It was written by another run.
    """
    if trainer.is_fsdp_enabled:
        from accelerate.utils import load_fsdp_model

        plugin = trainer.accelerator.state.fsdp_plugin
        load_fsdp_model(plugin, trainer.accelerator, trainer.model, str(folder))
        return
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / FILE_NAME)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])
