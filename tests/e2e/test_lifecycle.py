"""Starting, being watched, and leaving nothing behind."""

import psutil
import pytest

from tests.e2e.servers import Server, until
from tests.huge_pages import bytes_in_huge_pages, huge_pages_are_given


def test_health_and_readiness(server: Server) -> None:
    assert server.http.get("/healthz").json() == {"status": "alive"}
    assert server.http.get("/readyz").json() == {"status": "ready"}


DECIDED = (
    'rheostat_decisions_total{category="humanizing",decision="refuse",model_name="demo",'
    'policy="default",rule="greedy"}'
)
COUNTED = 'rheostat_requests_total{model_name="demo",route="/v1/chat/completions",'
ANSWERED = f'{COUNTED}status="200"}}'
REJECTED = f'{COUNTED}status="422"}}'
LATENCIES = "rheostat_decision_latency_seconds_count"
LATENCY_S = "rheostat_decision_latency_seconds_sum"


def test_metrics_count_requests_refusals_and_latency(server: Server) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is 2 plus 2?"}],
        "max_tokens": 2,
        "refusal": {"categories": {"humanizing": "always"}},
    }
    names = (DECIDED, ANSWERED, REJECTED, LATENCIES, LATENCY_S)
    before = [server.metric(name) for name in names]
    for _ in range(3):
        server.http.post("/v1/chat/completions", json=body)
    wrong = {**body, "refusal": []}
    assert server.http.post("/v1/chat/completions", json=wrong).is_error
    *counts, spent_s = [server.metric(n) - b for n, b in zip(names, before, strict=True)]
    assert counts == [3, 3, 1, 3]
    assert 0 < spent_s < 60
    assert "vllm:num_requests_running" in server.metrics()


@pytest.mark.skipif(not huge_pages_are_given(), reason="this system gives no huge pages")
def test_server_and_worker_hold_their_memory_in_huge_pages(server: Server) -> None:
    serving = psutil.Process(server.process.pid)
    worker = [one for one in serving.children(recursive=True) if one.name() == "VLLM::Worker"]
    assert [bytes_in_huge_pages(process.pid) > 2**25 for process in worker] == [True]
    until(lambda: bytes_in_huge_pages(serving.pid) > 2**25)  # it serves meanwhile
