"""`rheostat calibrate`: the margins of prompts with known categories, read off the engine."""

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
from models.hashes import checkpoint_hashes
from training.partial_scores import PartialScores
from training.prompts import PromptFiles, identified, read_prompts
from training.rows import Row
from training.scoring import TIMEOUT_S, OnScores, Scores, ScoringClient
from training.serving import serving, without_calibrations

SERVED_NAME = "calibrated"
# One token a prompt repays no compilation.
SERVER_FLAGS = ("--enforce-eager",)


@dataclass(frozen=True)
class Job:
    """What is to be calibrated, and with what.

    Attributes:
        model: The checkpoint's folder.
        prompts: Prompts with their categories.
        name: What the calibration is called.
        url: A server that already serves the checkpoint; None starts one.
        api_key: For a server that wants one.
        flags: Flags of vLLM for the server that is started.
        out: Folder whose `calibrations/` gets the result; None for the checkpoint's own.
        force: Whether a calibration of that name is measured anew.
    """

    model: Path
    prompts: PromptFiles
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
    """What became of a job.

    Attributes:
        calibration: The calibration.
        path: Its file.
        scored: Prompts that were sent to the engine; 0 where the calibration was there already.
        seconds: How long that took, without the server's start.
    """

    calibration: Calibration
    path: Path
    scored: int
    seconds: float

    def sentence(self) -> str:
        """Returns what happened, for people."""
        if not self.scored:
            return f"{self.path}: is there already, of the same data and checkpoint"
        speed = 60 * self.scored / max(self.seconds, 1e-9)
        return f"{self.path}: {self.scored} prompts in {self.seconds:.1f} s ({speed:,.0f} a minute)"


def calibrate(job: Job, console: Console) -> Measured:
    """Measures a checkpoint's margins and saves them as a calibration.

    What has been scored is kept at once: killed at any moment and started again, the same job goes
    on where it was. A calibration that the same job has already finished is kept.

    Args:
        job: What is to be done.
        console: Where progress goes, when it is a terminal.

    Raises:
        CheckpointError: The checkpoint cannot be served.
        ConfigError: The data are wrong or too few, or another calibration has that name.
        EvaluationError: The server does not start or does not answer as it should.
    """
    manifest, _ = load_checkpoint(job.model)
    names = tuple(manifest.names)
    rows = read_prompts(job.prompts, names)
    info = CalibrationInfo(
        name=_checked_name(job.name),
        created=datetime.now(UTC),
        categories=names,
        hashes=checkpoint_hashes(job.model),
        data_sha256=identified(job.prompts),
        seeds={} if job.prompts.limit is None else {"sample": job.prompts.seed},
        rheostat=version("rheostat"),
    )
    path = calibration_path(job.folder, job.name)
    if path.exists() and not job.force and (kept := _same(path, info, rows)):
        return Measured(kept, path, 0, 0.0)
    partial_path = path.with_name(f"{job.name}.partial.jsonl")
    key = _fingerprint(info, rows, job.flags)
    with PartialScores(partial_path, key, len(rows), len(names)) as partial:
        missing = partial.missing(len(rows))
        seconds = _score(job, rows, names, partial, console) if missing else 0.0
        margins, log_normaliser = partial.arrays(len(rows))
        calibration = Calibration(margins, log_normaliser, _indices(rows, names), info)
        save_calibration(job.folder, calibration)
        partial.remove()
    return Measured(calibration, path, len(missing), seconds)


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_-]{0,63}", name):
        raise ConfigError(
            f"--name {name!r}: must be lower-case letters, digits, - and _, a letter first"
        )
    return name


def _fingerprint(info: CalibrationInfo, rows: Sequence[Row], flags: Sequence[str]) -> str:
    """Returns the hash of everything that the scores depend on, the prompts' order included."""
    prompts = [[row.category, [message.model_dump() for message in row.prompt]] for row in rows]
    content = [info.categories, info.hashes.model_dump(), list(flags), prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _indices(rows: Sequence[Row], names: Sequence[str]) -> NDArray[np.int64]:
    found = [row.category for row in rows]
    return np.array([BENIGN if c is None else names.index(c) for c in found], dtype=np.int64)


def _same(path: Path, info: CalibrationInfo, rows: Sequence[Row]) -> Calibration | None:
    """Returns the calibration that is there where it is this job's; else raises."""
    kept = load_calibration(path)
    wanted = {"created", "rheostat", "recalibration"}
    if kept.info.model_dump(exclude=wanted) == info.model_dump(exclude=wanted) and np.array_equal(
        kept.category, _indices(rows, info.categories)
    ):
        return kept
    raise ConfigError(
        f"{path} was measured on other data or another checkpoint; --force replaces it, --name "
        "puts another beside it"
    )


def _score(
    job: Job, rows: Sequence[Row], names: Sequence[str], partial: PartialScores, console: Console
) -> float:
    with _server(job, console) as url, _bar(console) as bar:
        started = monotonic()
        task = bar.add_task("scoring", total=len(rows), completed=len(partial))

        def keep(places: Sequence[int], scores: Sequence[Scores]) -> None:
            _check_finite(places, scores, rows, names)
            partial.add(places, scores)
            bar.advance(task, len(places))

        missing = partial.missing(len(rows))
        asyncio.run(_ask(url, job.api_key, rows, names, missing, keep))
        return monotonic() - started


async def _ask(
    url: str,
    api_key: str | None,
    rows: Sequence[Row],
    names: Sequence[str],
    missing: Sequence[int],
    keep: OnScores,
) -> None:
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S) as http:
        client = ScoringClient(http)
        served = await client.categories()
        if served != list(names):
            raise EvaluationError(
                f"{url} serves a checkpoint of the categories {', '.join(served)}, not the one "
                f"to calibrate, which has {', '.join(names)}"
            )
        await client.score(rows, names, missing, keep)


def _check_finite(
    places: Sequence[int], scores: Sequence[Scores], rows: Sequence[Row], names: Sequence[str]
) -> None:
    for place, score in zip(places, scores, strict=True):
        values = (*score.margins, score.log_normaliser)
        for name, value in zip((*names, "the vocabulary"), values, strict=True):
            if not np.isfinite(value):
                raise EvaluationError(
                    f"{rows[place].origin}: the margin of {name!r} is {value}, no finite number: "
                    "the model's weights or its arithmetic are broken (try --dtype float32)"
                )


@contextmanager
def _server(job: Job, console: Console) -> Iterator[str]:
    if job.url is not None:
        yield job.url.rstrip("/").removesuffix("/v1")
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


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
