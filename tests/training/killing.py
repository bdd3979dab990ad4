"""Runs that are killed by SIGKILL at a chosen moment, in processes of their own."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SPAWN = multiprocessing.get_context("forkserver")
# The server imports once what each run would import for seconds.
SPAWN.set_forkserver_preload(
    [
        "training.run.train",
        "training.run.assembly",
        "training.measure.figures",
        "training.calibration.calibrate",
    ]
)
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
    return _watched(_train, (values, out), f"{out}.partial", kill_at)


def run_calibration(job: Any, kill_at: int | None = None) -> tuple[int, int]:
    """Calibrates in another process.

    Args:
        job: A `training.calibration.calibrate.Job` with a folder of its own.
        kill_at: As for `run`.

    Returns:
        As of `run`.
    """
    return _watched(_calibrate, (job,), str(job.folder), kill_at)


def _watched(
    act: Callable[..., None], args: tuple[Any, ...], place: str, kill_at: int | None
) -> tuple[int, int]:
    touched = SPAWN.Value("i", 0)
    process = SPAWN.Process(target=_act, args=(act, args, place, kill_at, touched))
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode is not None, "the run did not end"
    return process.exitcode, touched.value


def _act(
    act: Callable[..., None], args: tuple[Any, ...], place: str, kill_at: int | None, touched: Any
) -> None:
    def watch(event: str, about: tuple[Any, ...]) -> None:
        if event in CHANGES and about and place in str(about[0]):
            touched.value += 1
            if touched.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    act(*args)


def _train(values: dict[str, Any], out: Path) -> None:
    import torch

    from training.config.recipe import TrainConfig
    from training.run.train import train

    torch.set_num_threads(1)
    train(TrainConfig.model_validate(values), out)


def _calibrate(job: Any) -> None:
    from rich.console import Console

    from training.calibration.calibrate import calibrate

    calibrate(job, Console(stderr=True))
