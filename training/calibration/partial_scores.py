"""Scores as they come in, kept on disk so that an interrupted calibration goes on."""

import fcntl
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from models.errors import ConfigError
from training.calibration.scoring import Scores


class PartialScores:
    """An append-only file of scores, one line a prompt, under a heading that says of what.

    Killed at any moment it holds whole lines and at most one broken one, which is dropped. While
    it is open nobody else can open it.

    Args:
        path: The file; made where it is missing. One under another key is begun anew.
        key: Fingerprint of everything that the scores depend on.
        rows: Number of prompts.
        columns: Number of categories `k`.

    Raises:
        ConfigError: Another process has it open, or the place cannot be written.
    """

    def __init__(self, path: Path, key: str, rows: int, columns: int) -> None:
        self._path = path
        self._columns = columns
        self._scores: dict[int, Scores] = {}
        self._file = _open_alone(path)
        self._heading = {"key": key, "rows": rows, "columns": columns}
        self._keep(self._read())

    def __enter__(self) -> "PartialScores":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._scores)

    def missing(self, rows: int) -> list[int]:
        """Returns the places that have no scores yet, ascending."""
        return [place for place in range(rows) if place not in self._scores]

    def add(self, places: Sequence[int], scores: Sequence[Scores]) -> None:
        """Keeps scores; they outlive this process from here on."""
        pairs = list(zip(places, scores, strict=True))
        self._append([[place, score.log_normaliser, *score.margins] for place, score in pairs])
        self._scores.update(pairs)

    def begin_anew(self) -> None:
        """Forgets all scores."""
        self._scores.clear()
        self._keep(0)

    def arrays(self, rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns all margins `[rows, k]` and log-normalisers `[rows]`, fp32 as the engine's."""
        ordered = [self._scores[place] for place in range(rows)]
        margins = np.array([score.margins for score in ordered], dtype=np.float32)
        return margins, np.array([score.log_normaliser for score in ordered], dtype=np.float32)

    def remove(self) -> None:
        """Removes the file: what it held is saved elsewhere."""
        self._path.unlink(missing_ok=True)

    def _keep(self, size: int) -> None:
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._append([self._heading])

    def _append(self, lines: Sequence[Any]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> int:
        """Takes up the scores of the same key; returns how many bytes of the file are good."""
        first, *lines = self._file.read().splitlines(keepends=True) or [b""]
        if _parsed(first) != self._heading:
            return 0
        good = len(first)
        for line in lines:
            values = _parsed(line)
            if not isinstance(values, list) or len(values) != self._columns + 2:
                break
            place, log_normaliser, *margins = values
            self._scores[place] = Scores(tuple(margins), log_normaliser)
            good += len(line)
        return good


def remove_partial(path: Path, key: str) -> None:
    """Removes the scores of a job that is finished; those of another job stay."""
    with suppress(OSError), path.open("rb") as file:
        heading = _parsed(file.readline())
        if isinstance(heading, dict) and heading.get("key") == key:
            path.unlink()


def _open_alone(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"{path}: another calibration of that name is running") from error
    file.seek(0)
    return file


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
