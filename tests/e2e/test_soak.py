"""A server under mixed load: nothing is lost, counts agree, memory stays, and a hurried end.

`make soak` runs it for `SECONDS`; `make test-long` shortly.
"""

import asyncio
import logging
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from server.policies.credentials import generate_key, hash_key
from tests.e2e.servers import Server, rheostat_server, until
from tests.e2e.soak import SCORE, Counts, Load, Memory
from tests.e2e.traffic import (
    CHAT,
    FAILED,
    http_of,
    in_engine,
    long_chat,
    outcomes_of,
    under_way,
)

SOAK_S = float(os.environ.get("SOAK_S", "20"))
KEY = generate_key()
MOST = 128
FILE = f"""\
policies: {{open: {{}}, left: {{}}}}
tenants:
  soaking:
    policies: [open, left]
    keys: ["{hash_key(KEY)}"]
"""
# Caches fill in the first part of a run, and a short one is nothing but that.
SETTLES = 0.25
FLAT_FROM_S = 300
MOST_MB_A_MINUTE = 1.0
MOST_GROWTH_MB = 100
# By default oneDNN keeps 1,024 kernels, one a batch size and layer shape. They fill 0.9 GB over
# hours and would hide a leak of the worker's.
FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
REQUESTS = re.compile(r'^rheostat_requests_total\{.*route="(.+?)",status="(\d+)"\} (\S+)$', re.M)

_log = logging.getLogger(__name__)


@pytest.fixture(scope="module")
def soaked(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("soaked")
    (folder / "policies.yaml").write_text(FILE)
    variables = {"RHEOSTAT_POLICY_FILE": str(folder / "policies.yaml"), **FEW_KERNELS}
    with rheostat_server(checkpoint, folder / "log", variables=variables) as running:
        yield running


def counted(server: Server) -> Counter[tuple[str, int]]:
    """Returns the server's own counts of requests, by route and status."""
    found = REQUESTS.findall(server.metrics())
    return Counter({(route, int(status)): int(float(count)) for route, status, count in found})


def decided(server: Server) -> float:
    lines = server.metrics().splitlines()
    ours = [one for one in lines if one.startswith("rheostat_decisions_total{")]
    return sum(float(one.rsplit(" ", 1)[1]) for one in ours if 'policy="open"' in one)


@pytest.mark.long
@pytest.mark.timeout(SOAK_S + 300)
def test_mixed_load_loses_nothing_and_memory_stays(soaked: Server) -> None:
    counts, memory = Counts(), Memory(soaked)

    async def soak() -> None:
        watching = asyncio.create_task(memory.watch())
        await Load(soaked, KEY, counts).run(SOAK_S)
        watching.cancel()

    asyncio.run(soak())
    until(lambda: in_engine(soaked) == 0)
    until(lambda: counted(soaked)[CHAT, 499] >= counts.requests[CHAT, 499])
    report(counts, memory)
    assert counts.lost == 0
    assert counted(soaked) == counts.requests
    assert decided(soaked) == counts.decisions
    assert soaked.metric("rheostat_scored_prompts_total") == counts.scored
    assert counts.requests[SCORE, 200] > 0
    assert counts.requests[CHAT, 499] > 0
    for name in memory.samples:
        assert growth_mb(memory, name) < MOST_GROWTH_MB, name
        if SOAK_S >= FLAT_FROM_S:
            assert slope_mb(memory, name) < MOST_MB_A_MINUTE, name


def settled(memory: Memory, name: str) -> np.ndarray:
    samples = np.array(memory.samples[name])
    return samples[int(SETTLES * len(samples)) :]


def growth_mb(memory: Memory, name: str) -> float:
    mb = settled(memory, name)[:, 1]
    return float(mb[-1] - mb[0])


def slope_mb(memory: Memory, name: str) -> float:
    """Returns how fast the memory grows, by least squares, in MB a minute."""
    seconds, mb = settled(memory, name).T
    return float(np.polyfit(seconds / 60, mb, 1)[0])


def report(counts: Counts, memory: Memory) -> None:
    """Logs what `make soak` is for."""
    _log.info("%d requests in %g s, lost %d", sum(counts.requests.values()), SOAK_S, counts.lost)
    for (route, status), count in sorted(counts.requests.items()):
        _log.info("%6d  %s %d", count, route, status)
    _log.info("%6d decisions, %d prompts scored", counts.decisions, counts.scored)
    p50, p99 = np.quantile(counts.waited_s, [0.5, 0.99]) * 1e3
    _log.info("plain answers: p50 %.0f ms, p99 %.0f ms", p50, p99)
    for name in memory.samples:
        start, end = memory.samples[name][0][1], memory.samples[name][-1][1]
        slope = slope_mb(memory, name)
        _log.info("%s: %.0f MB, then %.0f MB; %+.2f MB a minute", name, start, end, slope)


@pytest.mark.long
def test_second_signal_ends_the_server_at_once(soaked: Server) -> None:
    children = psutil.Process(soaked.process.pid).children(recursive=True)

    async def hurry() -> Counter[str]:
        async with http_of(soaked, authorization=f"Bearer {KEY}") as client:
            wide = [{**long_chat(480, n=MOST), "refusal": {}, "stream": on} for on in (False, True)]
            asked = asyncio.create_task(outcomes_of(client, wide))
            await under_way(soaked, 2 * MOST)
            soaked.process.send_signal(signal.SIGTERM)
            while (await client.get("/readyz")).status_code == 200:
                pass
            assert not asked.done()
            soaked.process.send_signal(signal.SIGTERM)
            return await asked

    assert asyncio.run(hurry()) == {FAILED: 2}
    assert soaked.process.wait(timeout=10) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
