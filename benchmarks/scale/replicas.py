"""Replicas whose engines answer at once, and what their processes take of the processor."""

import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import socket
from tempfile import mkdtemp
from typing import NamedTuple

import httpx
import psutil
import uvloop

from server.web.admission import Counts
from server.workers.shared import SharedCounts

START_LIMIT_S = 300
MOST = 10_000
_NOT_YET = 2**31 - 1  # as vLLM's server reads it


class Replica(NamedTuple):
    """A server without an engine.

    Attributes:
        port: Where it listens.
        processes: Its HTTP processes.
    """

    port: int
    processes: list[psutil.Process]


@contextmanager
def replicas(
    model: Path, policies: Path, count: int, processes: int = 1
) -> Iterator[list[Replica]]:
    """Runs replicas.

    Args:
        model: The checkpoint's folder.
        policies: The policy file.
        count: How many.
        processes: HTTP processes of each.
    """
    with ExitStack() as ends:
        started = [ends.enter_context(_replica(model, policies, processes)) for _ in range(count)]
        for replica in started:
            _wait(replica)
        yield started


@contextmanager
def _replica(model: Path, policies: Path, processes: int) -> Iterator[Replica]:
    context = multiprocessing.get_context("spawn")
    sock = socket()
    sock.bind(("127.0.0.1", 0))
    several = processes > 1
    loads = context.RawArray("i", [_NOT_YET] * processes)
    counts = SharedCounts(context, MOST) if several else None
    # As vLLM sets it for several HTTP processes, before prometheus-client is imported.
    metrics = mkdtemp() if several else None
    work = [
        context.Process(target=_work, args=(model, policies, metrics, sock, loads, counts, index))
        for index in range(processes)
    ]
    environment = {} if metrics is None else {"PROMETHEUS_MULTIPROC_DIR": metrics}
    try:
        with _set(environment):
            for process in work:
                process.start()
        found = [psutil.Process(process.pid) for process in work]
        yield Replica(sock.getsockname()[1], found)
    finally:
        for process in work:
            process.kill()
            process.join()
        sock.close()
        if metrics is not None:
            shutil.rmtree(metrics)


@contextmanager
def _set(environment: dict[str, str]) -> Iterator[None]:
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            del os.environ[name]


def _work(
    model: Path,
    policies: Path,
    metrics: str | None,
    sock: socket,
    loads: MutableSequence[int],
    counts: Counts | None,
    index: int,
) -> None:
    os.environ["RHEOSTAT_POLICY_FILE"] = str(policies)
    # The access log is written, and nobody reads it.
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    from benchmarks.costs.instant import serve_own

    uvloop.run(serve_own(model, sock, loads, counts, index))


def _wait(replica: Replica) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        with suppress(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{replica.port}/healthz", timeout=5)
            return
        time.sleep(0.2)
    raise RuntimeError(f"no replica on port {replica.port}")


def processor_s(processes: Sequence[psutil.Process]) -> float:
    """Returns the processor time that processes have taken."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)
