"""What several HTTP processes of one server share: counts in memory, and a lock of their files."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from multiprocessing.context import SpawnContext
from multiprocessing.synchronize import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


class SharedCounts:
    """The answers under way of all processes: ``Counts`` of server/web/admission.py.

    A process that ends takes the others with it, so no count of a dead process stays. The processes
    need not know the same tenants: each may have read another version of the policy file.

    Args:
        context: Starts the processes.
        most: How many answers may be under way; a tenant with one has a row.
    """

    def __init__(self, context: SpawnContext, most: int) -> None:
        self._lock = context.RLock()
        self._memory = context.RawArray("q", 1 + 2 * (most + 1))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the other processes from counting."""
        with self._lock:
            yield

    @property
    def total(self) -> int:
        """How many there are."""
        return int(self._memory[0])

    def of(self, tenant: str | None) -> int:
        """Returns how many of a tenant there are."""
        with self._lock:
            keys, answers = self._rows()
            return int(answers[keys == _key(tenant)].sum())

    def add(self, tenant: str | None, answers: int) -> None:
        """Counts answers, within ``locked``; fewer than 0 are under way no more."""
        keys, rows = self._rows()
        found = np.flatnonzero(keys == _key(tenant))
        row = found[0] if found.size else np.argmin(rows)  # a row without answers is free
        keys[row] = _key(tenant)
        rows[row] += answers
        self._memory[0] += answers

    def _rows(self) -> tuple[Integers, Integers]:
        keys, answers = np.frombuffer(self._memory, dtype=np.int64)[1:].reshape(2, -1)
        return keys, answers


@lru_cache(maxsize=4096)
def _key(tenant: str | None) -> int:
    name = b"" if tenant is None else b"=" + tenant.encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest(), signed=True)


@dataclass(frozen=True)
class HttpProcess:
    """What one HTTP process has of the whole server.

    Attributes:
        sock: Bound; the processes take turns with its connections.
        scraped: Bound, for metrics and probes without a key; the first process answers there.
        counts: The answers under way of all processes; None: this is the only one.
        lock: Held by the one process that writes to a file; None: this is the only one.
        index: 0 is the first.
        loads: Open connections of each process.
        engine: How vLLM finds the engines, which another process has started; None: it starts them.
    """

    sock: socket.socket
    scraped: socket.socket | None
    counts: SharedCounts | None = None
    lock: RLock | None = None
    index: int = 0
    loads: Any = None
    engine: dict[str, Any] | None = None
