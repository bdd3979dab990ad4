"""The simulation against what can be computed, and the load against a server that counts."""

from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from benchmarks.scale.load import Load, chat, closed, opened
from benchmarks.scale.queues import Costs, Fleet, at_random, capacity, simulate
from benchmarks.scale.sizing import sizing_tables
from tests.benchmarks.answering import answering

REQUESTS = 20_000


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_one_process_waits_as_the_formula_says(busy: float) -> None:
    # Pollaczek and Khinchine, constant service s: busy * s / (2 * (1 - busy)).
    took = simulate(Costs(0, 0, 1.0), Fleet(1), at_random(busy, REQUESTS))
    assert np.min(took) == pytest.approx(1.0)
    assert np.mean(took) - 1.0 == pytest.approx(busy / (2 * (1 - busy)), rel=0.1)


def test_requests_in_the_engine_keep_no_process_busy() -> None:
    took = simulate(Costs(0, 0, 1.0, engine=500.0), Fleet(1), at_random(0.3, REQUESTS))
    assert np.min(took) == pytest.approx(501.0)
    assert np.mean(took) < 501.3


def test_replicas_with_the_fewest_requests_share_the_waiting() -> None:
    alone = simulate(Costs(0, 0, 1.0), Fleet(1), at_random(0.6, REQUESTS))
    many = simulate(Costs(0, 0, 1.0), Fleet(32), at_random(32 * 0.6, REQUESTS))
    assert np.quantile(many, 0.99) < 0.5 * np.quantile(alone, 0.99)


def test_two_cores_give_three_busy_processes_two_thirds_each() -> None:
    costs = Costs(client=0, gateway=0, http=3.0)
    # Three requests at once, one for each replica.
    took = simulate(costs, Fleet(3, cores=2), at_random(1e9, 3))
    assert took == pytest.approx([4.5] * 3)
    assert simulate(costs, Fleet(3), at_random(1e9, 3)) == pytest.approx([3.0] * 3)


def test_capacity_is_that_of_what_is_full_first() -> None:
    costs = Costs(client=0.1, gateway=0.2, http=1.0)
    assert capacity(costs, Fleet(3)) == pytest.approx(3.0)
    assert capacity(costs, Fleet(9)) == pytest.approx(5.0)
    assert capacity(costs, Fleet(9, gateways=9)) == pytest.approx(9.0)
    assert capacity(costs, Fleet(99, gateways=9)) == pytest.approx(10.0)
    assert capacity(costs, Fleet(99, gateways=9, cores=2)) == pytest.approx(2 / 1.3)


def test_load_sends_what_it_says() -> None:
    with answering() as server:
        port = urlsplit(server.url).port
        assert port is not None
        load = Load(port, [chat(b'{"turn": 1}', "a"), chat(b'{"turn": 2}', "b")])
        found = closed(load, 2, 6)
        assert sorted(body["turn"] for body in server.bodies) == [1, 1, 1, 2, 2, 2]
        assert set(server.keys) == {"Bearer a", "Bearer b"}
        assert len(found.latencies_s) == 6
        later = opened(load, 1000.0, 8, connections=3)
        assert len(later.latencies_s) == 8
        assert len(server.bodies) == 14


def test_load_says_what_was_not_answered() -> None:
    with answering(status=429) as server:
        load = Load(urlsplit(server.url).port or 0, [chat(b"{}", "a")])
        with pytest.raises(RuntimeError, match="429"):
            closed(load, 1, 1)


def test_tables_hold_what_was_measured() -> None:
    kinds = {"plain": 0.001, "streamed": 0.002}
    found: dict[str, Any] = {
        "pieces": {
            "instant": kinds,
            "engine": {
                "http_s": {"1": kinds, "64": kinds},
                "metrics": {"series": {"rheostat_": 50, "others": 7}, "bytes": 3000, "seconds": 1},
            },
            "policies": {"100": 0.25},
            "functions": {"a tenant by key": 7.0},
        },
        "processes": {
            "rates": {"1": [500.0], "2": [900.0]},
            "http_s": {"1": 0.002, "2": 0.0021},
            "ratio": 1.8,
            "range": [1.7, 1.9],
        },
        "check": {
            "seconds": {"client": 0.0001, "gateway": 0.0002, "http": 0.001},
            "others": 0.01,
            "capacity": {"predicted": 1500.0, "measured": 1400.0},
            "rows": [
                {
                    "rate": 300.0,
                    "others": 0.05,
                    "measured": {"p50": 0.002, "p90": 0.003, "p99": 0.004},
                    "predicted": {"p50": 0.001, "p90": 0.002, "p99": 0.003},
                }
            ],
        },
    }
    text = sizing_tables(found, 1000, simulated=2000)
    assert "| ratio | 1.80 (1.70 to 1.90) |  |" in text
    assert "| 300 | 0.05 | measured | 2.0 | 3.0 | 4.0 |" in text
    # 1,000 requests of 2 ms are 2 cores, and 4 processes that are 60 % busy.
    assert "| 64 | streamed | 2 | 4 | 0.3 |" in text
    assert "| 32 | 1,824 | 6 |" in text
