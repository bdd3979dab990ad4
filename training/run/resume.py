"""What a training run goes on from: resume points and best weights, each there in full or not."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.files import sync

KEPT = 2
STATE_NAME = "trainer_state.json"
WEIGHTS_NAME = "trained.safetensors"


class ResumePoints:
    """The resume points and best weights of one run.

    A point is written under a name that nobody reads, brought to the disk and then renamed. Best
    weights outlive a point that would need them.

    Args:
        folder: Where they lie; made when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.scratch = folder / "writing"
        """Where transformers writes the next point, as `checkpoint-STEP`."""

    def open(self) -> Path | None:
        """Removes what a killed run left unfinished.

        Returns:
            The newest point; None where there is none.
        """
        shutil.rmtree(self.scratch, ignore_errors=True)
        points = self._points()
        self._prune_best(points)
        return points[-1] if points else None

    def commit(self, step: int, best_step: int | None) -> None:
        """Makes what was written the newest point and removes those that are no longer needed."""
        name = f"checkpoint-{step}"
        self._publish(self.scratch / name, self._folder / name)
        points = self._points()
        for old in points[:-KEPT]:
            # Half removed it would pass for a point.
            shutil.rmtree(old.rename(self.scratch / old.name))
        self._prune_best(points[-KEPT:], best_step)

    def commit_best(self, written: Path, step: int) -> None:
        """Keeps the best weights so far."""
        self._publish(written, self.best(step))
        if not self._points():
            self._prune_best([], step)

    def best(self, step: int) -> Path:
        """Returns where the best weights of a step lie."""
        return self._folder / f"best-{step}"

    def remove(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _points(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint-*"), key=_step)

    def _publish(self, written: Path, place: Path) -> None:
        for path in (*sorted(written.rglob("*")), written):
            sync(path)
        # Replayed steps write it again.
        shutil.rmtree(place, ignore_errors=True)
        written.rename(place)
        sync(self._folder)

    def _prune_best(self, points: list[Path], best_step: int | None = None) -> None:
        needed = {best_step, *map(_best_step, points)}
        for best in self._folder.glob("best-*"):
            if _step(best) not in needed:
                shutil.rmtree(best)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _best_step(point: Path) -> int | None:
    state = json.loads((point / STATE_NAME).read_text(encoding="utf-8"))
    step: int | None = state["best_global_step"]
    return step


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
        save_file(trained, folder / WEIGHTS_NAME)
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

    saved = load_file(folder / WEIGHTS_NAME)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved[name])
