"""Training runs that are killed by SIGKILL at a chosen moment, in processes of their own."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

SPAWN = multiprocessing.get_context("forkserver")
# The server imports once what each run would import for seconds.
SPAWN.set_forkserver_preload(["training.train", "training.assembly", "training.plots"])
CHANGES = {"open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree"}
LIMIT_S = 120


def run(values: dict[str, Any], out: Path, kill_at: int | None = None) -> tuple[int, int]:
    """Trains in another process.

    Args:
        values: The recipe.
        out: The checkpoint's folder.
        kill_at: The process kills itself when it touches the run's folder for this time.

    Returns:
        The process's exit code, and how often it touched the folder.
    """
    touched = SPAWN.Value("i", 0)
    process = SPAWN.Process(target=_train, args=(values, out, kill_at, touched))
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode is not None, "the training did not end"
    return process.exitcode, touched.value


def _train(values: dict[str, Any], out: Path, kill_at: int | None, touched: Any) -> None:
    import torch

    from training.config import TrainConfig
    from training.train import train

    torch.set_num_threads(1)
    partial = f"{out}.partial"

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES and args and partial in str(args[0]):
            touched.value += 1
            if touched.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(TrainConfig.model_validate(values), out)
