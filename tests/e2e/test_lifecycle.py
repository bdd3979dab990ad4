"""Starting, being watched, and leaving nothing behind."""

import os
import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.servers import Server, rheostat_server
from tests.huge_pages import bytes_in_huge_pages, huge_pages_are_given
from tests.server.wires import connect


def test_health_and_readiness(server: Server) -> None:
    assert httpx.get(server.url + "/healthz", timeout=10).json() == {"status": "alive"}
    assert httpx.get(server.url + "/readyz", timeout=10).json() == {"status": "ready"}


def metric(text: str, line: str) -> float:
    return sum(float(each.rsplit(" ", 1)[1]) for each in text.splitlines() if each.startswith(line))


def test_metrics_count_requests_refusals_and_latency(server: Server) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is 2 plus 2?"}],
        "max_tokens": 2,
        "refusal": {"categories": {"humanizing": "always"}},
    }
    before = server.metrics()
    for _ in range(3):
        httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60)
    wrong = {**body, "refusal": []}
    assert httpx.post(server.url + "/v1/chat/completions", json=wrong, timeout=60).is_error
    after = server.metrics()

    decided = (
        'rheostat_decisions_total{category="humanizing",decision="refuse",policy="default",'
        'rule="greedy"}'
    )
    answered = 'rheostat_requests_total{route="/v1/chat/completions",status="200"}'
    refused = 'rheostat_requests_total{route="/v1/chat/completions",status="422"}'
    assert metric(after, decided) - metric(before, decided) == 3
    assert metric(after, answered) - metric(before, answered) == 3
    assert metric(after, refused) - metric(before, refused) == 1
    spent = "rheostat_decision_latency_seconds_sum"
    assert 0 < metric(after, spent) - metric(before, spent) < 60
    count = "rheostat_decision_latency_seconds_count"
    assert metric(after, count) - metric(before, count) == 3
    assert "vllm:num_requests_running" in after


@pytest.mark.skipif(not huge_pages_are_given(), reason="this system gives no huge pages")
def test_server_and_worker_hold_their_memory_in_huge_pages(server: Server) -> None:
    serving = psutil.Process(server.process.pid)
    worker = [one for one in serving.children(recursive=True) if one.name() == "VLLM::Worker"]
    for process in (serving, *worker):
        assert bytes_in_huge_pages(process.pid) > 100 * 2**20, process.name()
    assert len(worker) == 1


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_server_takes_its_children_with_it(
    checkpoint: Path, tmp_path: Path, ending: signal.Signals
) -> None:
    file = tmp_path / "policies.yaml"
    file.write_text("policies: {all: {}}\nanonymous: all\n")
    variables = {"RHEOSTAT_POLICY_FILE": str(file)}
    with (
        rheostat_server(checkpoint, tmp_path / "server.log", variables=variables) as server,
        connect(server.port) as half_head,
        connect(server.port) as half_body,
    ):
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert any(child.is_running() for child in children)
        # Neither clients that stop short nor what becomes of the policy file holds the end.
        half_head.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        half_body.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        file.unlink()
        os.mkfifo(file)
        wait_until_bad(server)
        server.process.send_signal(ending)
        server.process.wait(timeout=30)
        gone, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        assert len(gone) == len(children)


def wait_until_bad(server: Server) -> None:
    deadline = time.monotonic() + 30
    while "rheostat_policy_file_valid 0" not in server.metrics():
        assert time.monotonic() < deadline
        time.sleep(0.1)
