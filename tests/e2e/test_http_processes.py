"""Two HTTP processes before one engine: one set of bounds, metrics and decisions, one end."""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from prometheus_client.mmap_dict import MmapedDict

from server.policies.credentials import generate_key, hash_key
from tests.e2e.servers import Post, Server, rheostat_server, until
from tests.e2e.test_ending import ENDS_WITHIN_S, check_ended, children_of
from tests.e2e.traffic import (
    ANSWERED,
    CHAT,
    FAILED,
    TURNED_AWAY,
    http_of,
    long_chat,
    outcomes_of,
    requests_metric,
    under_way,
)

pytestmark = pytest.mark.long

ACME, CROWD = generate_key(), generate_key()
CROWDS_MOST = 3
ASKED = 64


def policies(text: str) -> str:
    return f"""\
policies:
  desk: {{report: true}}
  kiosk:
    floors: {{safety: {{bias: 60}}}}
    refusal_text: {{safety: {text}}}
tenants:
  acme: {{policies: [desk, kiosk], keys: ["{hash_key(ACME)}"]}}
  crowd: {{policies: [desk], keys: ["{hash_key(CROWD)}"], max_running: {CROWDS_MOST}}}
anonymous: null
"""


class Doubled(NamedTuple):
    """A server with two HTTP processes, its files, and where its metrics lie."""

    server: Server
    file: Path
    trace: Path
    margins: Path
    metrics: Path

    def decided_by(self) -> Counter[int]:
        """Returns how many decisions each process has counted, by its id."""
        counted: Counter[int] = Counter()
        for path in self.metrics.glob("counter_*.db"):
            read: Any = MmapedDict.read_all_values_from_file  # without annotations
            for key, value, *_ in read(str(path)):
                if json.loads(key)[0] == "rheostat_decisions":
                    counted[int(path.stem.split("_")[1])] += int(value)
        return counted


def doubled_server(checkpoint: Path, folder: Path) -> Doubled:
    names = ("policies.yaml", "trace.jsonl", "margins.json", "metrics")
    file, trace, margins, metrics = (folder / name for name in names)
    file.write_text(policies("version 1"))
    metrics.mkdir()
    variables = {
        "RHEOSTAT_POLICY_FILE": str(file),
        "RHEOSTAT_TRACE_FILE": str(trace),
        "RHEOSTAT_RECORD_FILE": str(margins),
        "RHEOSTAT_RECORD_SHARE": "1",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }
    flags = ["--api-server-count", "2"]
    server = rheostat_server(checkpoint, folder / "log", *flags, variables=variables)
    return Doubled(server, file, trace, margins, metrics)


@pytest.fixture(scope="module")
def doubled(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doubled]:
    found = doubled_server(checkpoint, tmp_path_factory.mktemp("doubled"))
    with found.server:
        until_both_answer(found)
        yield found


def until_both_answer(doubled: Doubled) -> None:
    """Waits for the second process, which begins to listen a little later."""

    def both() -> bool:
        doubled.server.post_all([chat()] * 4)
        return len(doubled.decided_by()) == 2

    until(both)


def processes(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [child for child in children if child.name().startswith("VLLM::APIServer")]


def chat(**refusal: Any) -> Post:
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": "demo", "messages": [question], "max_tokens": 4, "refusal": refusal}
    return Post(CHAT, body, {"authorization": f"Bearer {ACME}"})


def test_both_decide_and_count_as_one(doubled: Doubled) -> None:
    server = doubled.server
    counted = ("rheostat_decisions_total", requests_metric(CHAT, 200))
    before = [server.metric(name) for name in counted]
    dials = [dict.fromkeys(("safety", "humanizing"), word) for word in ("always", "never")]
    posts = [chat(report=True, categories=dials[i % 2]) for i in range(ASKED)]
    answers = server.post_all(posts)
    assert {answer.status_code for answer in answers} == {200}
    reports = [answer.json()["choices"][0]["refusal_report"] for answer in answers]
    assert [report["refused"] for report in reports] == [True, False] * (ASKED // 2)
    margins = {round(report["decisions"]["safety"]["margin"], 3) for report in reports}
    assert len(margins) == 1
    by_process = doubled.decided_by()
    assert by_process.keys() >= {process.pid for process in processes(server)}
    assert all(counted >= 8 for counted in by_process.values())
    after = [server.metric(name) for name in counted]
    assert [now - was for now, was in zip(after, before, strict=True)] == [ASKED, ASKED]
    # Each process has decided once before it answered anybody, and counted that nowhere.
    until(lambda: len(doubled.trace.read_text().splitlines()) == after[0])
    lines = [json.loads(line) for line in doubled.trace.read_text().splitlines()]
    words = Counter(line["decision"] for line in lines if "categories" in line["asked"])
    assert words == {"refuse": ASKED // 2, "respond": ASKED // 2}
    until(lambda: recorded(doubled.margins) == after[0])


def recorded(path: Path) -> int:
    policies = json.loads(path.read_text())["policies"]
    return sum(policy["rows"] for policy in policies.values())


def test_a_tenants_bound_holds_over_both(doubled: Doubled) -> None:
    async def crowd() -> tuple[Counter[str], Counter[str]]:
        body = {**long_chat(300), "refusal": {}}
        async with http_of(doubled.server, authorization=f"Bearer {CROWD}") as client:
            wide = {**body, "n": CROWDS_MOST}
            held = asyncio.create_task(outcomes_of(client, [wide]))
            await under_way(doubled.server, CROWDS_MOST)
            late = await outcomes_of(client, [body] * 40)
            return await held, late

    held, late = asyncio.run(crowd())
    assert held == {ANSWERED: 1}
    assert late == {TURNED_AWAY: 40}
    assert doubled.server.metric("rheostat_answers_under_way") == 0

    async def race() -> Counter[str]:
        body = {**long_chat(200), "refusal": {}}
        async with http_of(doubled.server, authorization=f"Bearer {CROWD}") as client:
            return await outcomes_of(client, [body] * 24)

    raced = asyncio.run(race())
    # They come within less than one answer takes, so no place is given twice.
    assert raced == {ANSWERED: CROWDS_MOST, TURNED_AWAY: 24 - CROWDS_MOST}


def test_both_reload_the_policies_whole(doubled: Doubled) -> None:
    posts = [chat(policy="kiosk", categories={"safety": "never"})] * 16

    def texts() -> set[str]:
        answers = doubled.server.post_all(posts)
        assert {answer.status_code for answer in answers} == {200}
        return {answer.json()["choices"][0]["message"]["refusal"] for answer in answers}

    assert texts() == {"version 1"}
    doubled.file.write_text(policies("version 2"))
    until(lambda: texts() == {"version 2"})
    reloads = doubled.server.metric('rheostat_policy_reloads_total{model_name="demo",result="ok"}')
    assert reloads == 2
    doubled.server.process.send_signal(signal.SIGHUP)
    until(lambda: doubled.server.metric("rheostat_policy_reloads_total") == 4)
    assert doubled.server.metric("rheostat_policy_file_valid") == 1


def test_both_drain(doubled: Doubled) -> None:
    server = doubled.server
    children = children_of(server)
    body = {**long_chat(300), "refusal": {}}
    flight = [{**body, "stream": i % 2 == 0} for i in range(32)]

    async def drain() -> tuple[Counter[str], Counter[str]]:
        async with http_of(server, authorization=f"Bearer {ACME}") as client:
            in_flight = asyncio.create_task(outcomes_of(client, flight))
            await under_way(server, 32)
            server.process.send_signal(signal.SIGTERM)
            await not_ready(client)
            return await in_flight, await outcomes_of(client, [])

    in_flight, _ = asyncio.run(drain())
    assert in_flight == {ANSWERED: len(flight)}
    check_ended(server, children, 0)


async def not_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(5):
        while (await client.get("/readyz")).status_code == 200:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("victim", "others"), [("VLLM::EngineCore", FAILED), ("VLLM::APIServer_1", ANSWERED)]
)
def test_processes_end_together(checkpoint: Path, tmp_path: Path, victim: str, others: str) -> None:
    doubled = doubled_server(checkpoint, tmp_path)
    with doubled.server as server:
        until_both_answer(doubled)
        children = children_of(server)
        (killed_one,) = (child for child in children if child.name() == victim)
        outcomes, took_s = asyncio.run(interrupted(server, killed_one.kill, tokens=300))
        assert outcomes[others] > 8
        assert took_s < ENDS_WITHIN_S
        check_ended(server, children, 1)


def test_second_signal_ends_both_at_once(checkpoint: Path, tmp_path: Path) -> None:
    doubled = doubled_server(checkpoint, tmp_path)
    with doubled.server as server:
        until_both_answer(doubled)
        children = children_of(server)

        def twice() -> None:
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "ending:" in server.log.read_text())
            server.process.send_signal(signal.SIGTERM)

        outcomes, took_s = asyncio.run(interrupted(server, twice, tokens=480))
        assert outcomes == {FAILED: 32}
        assert took_s < ENDS_WITHIN_S
        check_ended(server, children, 0)


async def interrupted(
    server: Server, interrupt: Callable[[], None], *, tokens: int
) -> tuple[Counter[str], float]:
    """Returns what becomes of requests in flight, and how long that takes."""
    body = {**long_chat(tokens, n=2), "refusal": {}}
    async with http_of(server, authorization=f"Bearer {ACME}") as client:
        in_flight = asyncio.create_task(outcomes_of(client, [body] * 32))
        await under_way(server, 48)
        began_s = time.monotonic()
        await asyncio.to_thread(interrupt)
        return await in_flight, time.monotonic() - began_s
