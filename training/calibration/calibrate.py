"""`rheostat calibrate`: the margins of prompts with known categories, read off the engine."""

import asyncio
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from models.calibration import (
    BENIGN,
    CALIBRATIONS,
    Calibration,
    CalibrationInfo,
    calibration_path,
    load_calibration,
    save_calibration,
)
from models.checkpoint import load_checkpoint
from models.errors import ConfigError, EvaluationError
from models.hashes import Hashes, checkpoint_hashes
from training.calibration.prompts import Prompts, identified, read_prompts, repeated
from training.client import OnScores, Scores, Served, check_finite, client_of
from training.data.rows import Row
from training.serving import serving, without_calibrations

SERVED_NAME = "calibrated"
# One token a prompt repays no compilation.
SERVER_FLAGS = ("--enforce-eager",)


@dataclass(frozen=True)
class Job:
    """What is to be calibrated, and with what.

    Attributes:
        url: A server that already serves the checkpoint; None starts one.
        flags: Flags of vLLM for the server that is started.
        out: Folder whose `calibrations/` gets the result; None for the checkpoint's own.
    """

    model: Path
    prompts: Prompts
    name: str = "default"
    url: str | None = None
    api_key: str | None = None
    flags: tuple[str, ...] = ()
    out: Path | None = None
    force: bool = False

    @property
    def folder(self) -> Path:
        """The folder whose `calibrations/` gets the result."""
        return self.out or self.model


class Measured(NamedTuple):
    """What became of a job."""

    calibration: Calibration
    path: Path
    rows: Sequence[Row]
    kept: bool = False
    seconds: float = 0.0

    def sentence(self) -> str:
        """Returns what happened, for people."""
        if self.kept:
            return f"{self.path}: is there already, of the same data and checkpoint"
        scored, again = len(self.rows), repeated(self.rows)
        speed = 60 * scored / max(self.seconds, 1e-9)
        done = f"{self.path}: {scored} prompts in {self.seconds:.1f} s ({speed:,.0f} a minute)"
        if not again:
            return done
        return f"{done}; {again} repeat an earlier one, and count as often as they occur"


def calibrate(job: Job, console: Console) -> Measured:
    """Measures a checkpoint's margins and saves them as a calibration.

    A calibration that the same job has already finished is kept.

    Raises:
        CheckpointError: The checkpoint cannot be served.
        ConfigError: The data are wrong or too few, or another calibration has that name.
        EvaluationError: The server does not start or does not answer as it should.
    """
    manifest, _ = load_checkpoint(job.model)
    names = tuple(manifest.names)
    rows = read_prompts(job.prompts, names, console.print)
    hashes = checkpoint_hashes(job.model)
    info = CalibrationInfo(
        name=_checked_name(job.name),
        created=datetime.now(UTC),
        categories=names,
        hashes=hashes,
        data_sha256=identified(job.prompts),
        seeds={} if job.prompts.limit is None else {"sample": job.prompts.seed},
        job_sha256=_fingerprint(names, hashes, rows, job.flags),
        rheostat=version("rheostat"),
    )
    path = calibration_path(job.folder, job.name)
    if path.exists() and not job.force:
        return Measured(_same(path, info), path, rows, kept=True)
    _make_folder(path.parent)
    scores, seconds = _score(job, rows, info, console)
    # fp32, as the engine's.
    margins = np.array([score.margins for score in scores], dtype=np.float32)
    log_normaliser = np.array([score.log_normaliser for score in scores], dtype=np.float32)
    calibration = Calibration(margins, log_normaliser, _indices(rows, names), info)
    _remove_unfinished(path)
    save_calibration(job.folder, calibration)
    return Measured(calibration, path, rows, seconds=seconds)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
        raise ConfigError(
            f"--name {name!r}: must be lower-case letters, digits, - and _, a letter first"
        )
    return name


def _fingerprint(
    names: Sequence[str], hashes: Hashes, rows: Sequence[Row], flags: Sequence[str]
) -> str:
    """Returns the hash of everything that the scores depend on, the prompts' order included."""
    prompts = [[row.category, [message.model_dump() for message in row.prompt]] for row in rows]
    content = [list(names), hashes.model_dump(), list(flags), prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _indices(rows: Sequence[Row], names: Sequence[str]) -> NDArray[np.int64]:
    found = [row.category for row in rows]
    return np.array([BENIGN if c is None else names.index(c) for c in found], dtype=np.int64)


def _same(path: Path, info: CalibrationInfo) -> Calibration:
    """Returns the calibration that is there where it is this job's; else raises."""
    kept = load_calibration(path)
    if kept.info.job_sha256 == info.job_sha256:
        return kept
    theirs, ours = kept.info, info
    what = "a different checkpoint" if theirs.hashes != ours.hashes else "different prompts"
    if theirs.hashes == ours.hashes and theirs.data_sha256 == ours.data_sha256:
        what = "the same files read in a different way, or with different flags"
    raise ConfigError(
        f"{path} was measured on {what}; --force replaces it, --name puts another beside it"
    )


def _make_folder(folder: Path) -> None:
    """Makes the calibrations' folder before anything is measured that could not be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder}: cannot be written")


def _remove_unfinished(path: Path) -> None:
    """Removes what earlier runs of that name were writing when they were killed."""
    for unfinished in path.parent.glob(f"{path.name}.*.partial"):
        unfinished.unlink(missing_ok=True)


def _score(
    job: Job, rows: Sequence[Row], info: CalibrationInfo, console: Console
) -> tuple[list[Scores], float]:
    found: dict[int, Scores] = {}
    bar = Progress(console=console, disable=not console.is_terminal)
    with _server(job, console) as url, bar:
        started = monotonic()
        task = bar.add_task("scoring", total=len(rows))

        def keep(places: Sequence[int], scores: Sequence[Scores]) -> None:
            check_finite(places, scores, rows, info.categories)
            found.update(zip(places, scores, strict=True))
            bar.advance(task, len(places))

        asyncio.run(_ask(url, job.api_key, rows, info, keep))
        return [found[place] for place in range(len(rows))], monotonic() - started


async def _ask(
    url: str,
    api_key: str | None,
    rows: Sequence[Row],
    info: CalibrationInfo,
    keep: OnScores,
) -> None:
    async with client_of(url, api_key) as client:
        _check_served(url, await client.served(), info)
        await client.score(rows, info.categories, keep)


def _check_served(url: str, served: Served, info: CalibrationInfo) -> None:
    if served.names != info.categories:
        raise EvaluationError(
            f"{url} serves a checkpoint of the categories {', '.join(served.names)}, not the one "
            f"to calibrate, which has {', '.join(info.categories)}"
        )
    for what, theirs in served.hashes.model_dump().items():
        ours = getattr(info.hashes, what)
        if theirs != ours:
            raise EvaluationError(
                f"{url} serves a checkpoint with the {what} {theirs[:12]}, not the one to "
                f"calibrate, whose {what} is {ours[:12]}"
            )


@contextmanager
def _server(job: Job, console: Console) -> Iterator[str]:
    if job.url is not None:
        yield job.url
        return
    log = job.folder / CALIBRATIONS / f"{job.name}-server.log"
    flags = (*SERVER_FLAGS, *job.flags)
    with ExitStack() as stack:
        model = stack.enter_context(without_calibrations(job.model))
        with console.status(f"starting vLLM (its log: {log})"):
            url = stack.enter_context(
                serving(model, SERVED_NAME, log, flags, inherit_settings=False)
            )
        yield url
    log.unlink(missing_ok=True)
