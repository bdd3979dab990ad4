"""Counts the margins of a share of the traffic, for ``rheostat calibrate --check``."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from models.errors import ConfigError
from models.histogram import (
    BINS,
    PolicyMargins,
    RecordedMargins,
    bin_index,
    load_margins,
    save_margins,
)
from server.background import repeated

FLUSH_S = 5.0

Counts = NDArray[np.int64]

_log = logging.getLogger(__name__)


class MarginRecorder:
    """Histograms of one served checkpoint's margins, by policy and category.

    Args:
        path: The file of the counts. Counts of the same weights continue; those of other weights
            are dropped.
        share: Share of the requests to record, 0..1.
        names: The categories in manifest order.
        weights_sha256: Hash of the served weights.
        seed: Of the draws; None takes one from the operating system.
        lock: Held by the one process that writes, where several add to the same file; None: this
            is the only one.

    Raises:
        ConfigError: The file has other content, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        share: float,
        names: Sequence[str],
        weights_sha256: str,
        seed: int | None = None,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self._path = path
        self._share = share
        self._random = Random(seed)
        self._names = tuple(names)
        self._weights_sha256 = weights_sha256
        self._lock = lock
        self._rows = np.arange(len(self._names))
        self._since = _now()
        # This process's since the file was written.
        self._new: dict[str, Counts] = {}
        try:
            with lock or nullcontext():
                self._written = self._read() if path.exists() else {}
                self._save(self._written)
        except OSError as error:
            raise ConfigError(
                f"RHEOSTAT_RECORD_FILE: {path} cannot be written: {error.strerror}"
            ) from error

    def draws_next(self) -> bool:
        """Returns whether the next request is recorded: a draw that no request can influence."""
        return self._random.random() < self._share

    def add(self, policy: str, margins: Sequence[float]) -> None:
        """Counts one decision's margins, in manifest order."""
        counts = self._new.get(policy)
        if counts is None:
            counts = self._new[policy] = np.zeros((len(self._names), BINS), dtype=np.int64)
        counts[self._rows, bin_index(margins)] += 1

    def counts(self) -> dict[str, Counts]:
        """Returns a copy of the counts: by policy, `[k, BINS]`."""
        return _sum(self._written, self._new)

    @asynccontextmanager
    async def flushing(self, every_s: float = FLUSH_S) -> AsyncIterator[None]:
        """Writes new counts every few seconds, and at the end."""
        async with repeated(self._flush_beside, every_s, finishes=True):
            yield

    async def _flush_beside(self, _: bool) -> None:
        new = _sum(self._new)
        if not new and self._lock is None:
            return
        try:
            written = await asyncio.to_thread(self._write, new)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error.strerror)
        except ConfigError as error:  # what another process wrote is gone
            _log.warning("%s", error.message)
        else:
            self._keep(written, new)

    def flush(self) -> None:
        """Writes the new counts.

        Raises:
            OSError: The file cannot be written.
        """
        new = _sum(self._new)
        self._keep(self._write(new), new)

    def _write(self, new: Mapping[str, Counts]) -> dict[str, Counts]:
        with self._lock or nullcontext():
            written = self._written if self._lock is None else self._read()
            total = _sum(written, new)
            if new:
                self._save(total)
        return total

    def _keep(self, written: dict[str, Counts], new: Mapping[str, Counts]) -> None:
        # What came up while they were written is left.
        left = {policy: counts - new.get(policy, 0) for policy, counts in self._new.items()}
        self._new = {policy: counts for policy, counts in left.items() if counts.any()}
        self._written = written

    def _save(self, all_counts: Mapping[str, Counts]) -> None:
        policies = {
            policy: PolicyMargins(
                rows=int(counts[0].sum()),
                counts=dict(zip(self._names, map(tuple, counts.tolist()), strict=True)),
            )
            for policy, counts in all_counts.items()
        }
        recorded = RecordedMargins(
            since=self._since,
            until=_now(),
            weights_sha256=self._weights_sha256,
            policies=policies,
        )
        save_margins(self._path, recorded)

    def _read(self) -> dict[str, Counts]:
        recorded = load_margins(self._path)
        same_categories = all(tuple(p.counts) == self._names for p in recorded.policies.values())
        if recorded.weights_sha256 != self._weights_sha256 or not same_categories:
            return {}
        self._since = recorded.since
        return {
            policy: np.array(list(margins.counts.values()), dtype=np.int64)
            for policy, margins in recorded.policies.items()
        }


def _sum(*parts: Mapping[str, Counts]) -> dict[str, Counts]:
    total: dict[str, Counts] = {}
    for part in parts:
        for policy, counts in part.items():
            total[policy] = total[policy] + counts if policy in total else counts.copy()
    return total


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
