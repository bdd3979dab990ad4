"""Returns margins from the worker through shared memory, one row a request.

vLLM returns log-probabilities at a price that every step pays; margins belong to one step. So a
request that wants margins names a row. The worker writes the row in the decision step, before the
server can see the chosen token, and the server reads the row when that token arrives. A tag in the
row names its request. A worker without memory shared with the server leaves the old tag; then the
margins are asked for once more, where vLLM's model runner allows it.
"""

import asyncio
import fcntl
import os
import tempfile
import weakref
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

PREFIX = "rheostat-margins-"
ROWS = 4096
# Rows hold tags as fp32, which is exact up to here.
_TAGS = 2**24 - 1
# A row: tag, log-normaliser, margins.
MARGINS = 2


class Ticket(NamedTuple):
    """The row of one request.

    Attributes:
        path: The board's file.
        row: Index of the row.
        tag: Identifies the request; never 0.
    """

    path: str
    row: int
    tag: int


class Margins(NamedTuple):
    """The model's own margins at a decision step.

    Attributes:
        log_normaliser: Log-sum-exp of the whole vocabulary's logits minus the respond token's.
        margins: fp32 log-odds, one a category.
    """

    log_normaliser: float
    margins: tuple[float, ...]


class MarginBoard:
    """The server's side: hands out rows and reads them.

    Args:
        categories: Margins a row.
        folder: Of the file; by default in memory where the system has such a folder.
    """

    def __init__(self, categories: int, folder: Path | None = None) -> None:
        shared = Path("/dev/shm")
        folder = folder or (shared if shared.is_dir() else Path(tempfile.gettempdir()))
        _remove_abandoned(folder)
        descriptor, self._path = _locked_file(folder)
        self._remove = weakref.finalize(self, _remove, descriptor, self._path)
        shape = (ROWS, MARGINS + categories)
        self._rows = np.memmap(self._path, dtype=np.float32, mode="w+", shape=shape)
        self._free = deque(range(ROWS))
        self._free_rows = asyncio.Semaphore(ROWS)
        self._tag = 0

    async def take(self) -> Ticket:
        """Returns a row for one request; waits while all are taken."""
        await self._free_rows.acquire()
        self._tag = self._tag % _TAGS + 1
        return Ticket(self._path, self._free.popleft(), self._tag)

    def read(self, ticket: Ticket) -> Margins | None:
        """Returns the margins of a ticket, or None if the worker did not write them."""
        tag, normaliser, *margins = self._rows[ticket.row].tolist()
        return Margins(normaliser, tuple(margins)) if tag == ticket.tag else None

    def give_back(self, ticket: Ticket) -> None:
        """Frees a row. If a worker still writes it, the old tag tells the reader."""
        self._free.append(ticket.row)
        self._free_rows.release()

    def close(self) -> None:
        """Removes the file; garbage collection and exit do so too."""
        self._remove()


def _locked_file(folder: Path) -> tuple[int, str]:
    # Locked for as long as its process lives, however that ends.
    while True:
        descriptor, path = tempfile.mkstemp(prefix=PREFIX, dir=folder)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, path
        os.close(descriptor)  # before it was locked, another server removed it as abandoned


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is locked, another user's, or gone by now
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def _remove(descriptor: int, path: str) -> None:
    Path(path).unlink(missing_ok=True)
    os.close(descriptor)
