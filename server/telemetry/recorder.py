"""Counts the margins of a share of the traffic, for ``rheostat calibrate --check``."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
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
    ) -> None:
        self._path = path
        self._share = share
        self._random = Random(seed)
        self._names = tuple(names)
        self._weights_sha256 = weights_sha256
        self._rows = np.arange(len(self._names))
        self._since = _now()
        self._counts: dict[str, Counts] = {}
        self._changed = True
        if path.exists():
            self._go_on_with(load_margins(path))
        try:
            self.flush()
        except OSError as error:
            raise ConfigError(
                f"RHEOSTAT_RECORD_FILE: {path} cannot be written: {error.strerror}"
            ) from error

    def draws_next(self) -> bool:
        """Returns whether the next request is recorded: a draw that no request can influence."""
        return self._random.random() < self._share

    def add(self, policy: str, margins: Sequence[float]) -> None:
        """Counts one decision's margins, in manifest order."""
        counts = self._counts.get(policy)
        if counts is None:
            counts = self._counts[policy] = np.zeros((len(self._names), BINS), dtype=np.int64)
        counts[self._rows, bin_index(margins)] += 1
        self._changed = True

    def counts(self) -> dict[str, Counts]:
        """Returns a copy of the counts: by policy, `[k, BINS]`."""
        return {policy: counts.copy() for policy, counts in self._counts.items()}

    @asynccontextmanager
    async def flushing(self, every_s: float = FLUSH_S) -> AsyncIterator[None]:
        """Writes changed counts every few seconds, and at the end."""
        async with repeated(self._flush_beside, every_s, finishes=True):
            yield

    async def _flush_beside(self, _: bool) -> None:
        if not self._changed:
            return
        recorded = self._read()
        try:
            await asyncio.to_thread(save_margins, self._path, recorded)
        except OSError as error:
            self._changed = True
            _log.warning("%s cannot be written: %s", self._path, error.strerror)

    def flush(self) -> None:
        """Writes the counts if they changed.

        Raises:
            OSError: The file cannot be written.
        """
        if self._changed:
            save_margins(self._path, self._read())

    def _read(self) -> RecordedMargins:
        self._changed = False
        policies = {
            policy: PolicyMargins(
                rows=int(counts[0].sum()),
                counts=dict(zip(self._names, map(tuple, counts.tolist()), strict=True)),
            )
            for policy, counts in self._counts.items()
        }
        return RecordedMargins(
            since=self._since,
            until=_now(),
            weights_sha256=self._weights_sha256,
            policies=policies,
        )

    def _go_on_with(self, recorded: RecordedMargins) -> None:
        same_categories = all(tuple(p.counts) == self._names for p in recorded.policies.values())
        if recorded.weights_sha256 != self._weights_sha256 or not same_categories:
            return
        self._since = recorded.since
        for policy, margins in recorded.policies.items():
            self._counts[policy] = np.array(list(margins.counts.values()), dtype=np.int64)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
