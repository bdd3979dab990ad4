"""Real replicas, whose engines answer at once: several HTTP processes, and nginx before two."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import psutil

from benchmarks.scale.load import Found, Load, closed, opened
from benchmarks.scale.pieces import request
from benchmarks.scale.queues import Costs, Fleet, Seconds, capacity, simulate
from benchmarks.scale.replicas import processor_s, replicas
from benchmarks.serving.servers import Site
from tests.docker.gateway import nginx

AT_ONCE = 32
ROUNDS = 5
# Of what the simulation says two cores carry.
SHARES = (0.3, 0.6, 0.8)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def compare_processes(site: Site, requests: int) -> dict[str, Any]:
    """Returns the requests a second of one and of two HTTP processes, in turn, and their ratio."""
    policies = site.folder / "policies.yaml"
    with (
        replicas(site.model, policies, 1, 1) as (one,),
        replicas(site.model, policies, 1, 2) as (two,),
    ):
        rates: dict[str, list[float]] = {"1": [], "2": []}
        taken: dict[str, list[float]] = {"1": [], "2": []}
        for turn in range(-1, ROUNDS):
            for name, replica in (("1", one), ("2", two)):
                before_s = processor_s(replica.processes)
                found = closed(Load(replica.port, [request("plain", 16)]), AT_ONCE, requests)
                if turn >= 0:
                    rates[name].append(found.rate)
                    taken[name].append((processor_s(replica.processes) - before_s) / requests)
    ratios = np.array(rates["2"]) / np.array(rates["1"])
    return {
        "rates": rates,
        "http_s": {name: float(np.median(values)) for name, values in taken.items()},
        "client_s": found.client_s / requests,
        "ratio": float(np.median(ratios)),
        "range": [float(ratios.min()), float(ratios.max())],
    }


def check_simulation(site: Site, requests: int) -> dict[str, Any]:
    """Returns what two replicas behind nginx do at several rates, and what is predicted."""
    prefix = site.folder / "nginx"
    prefix.mkdir()
    with ExitStack() as ends:
        pair = ends.enter_context(replicas(site.model, site.folder / "policies.yaml", 2))
        gateway = ends.enter_context(nginx(prefix, [replica.port for replica in pair]))
        load = Load(gateway.port, [request("plain", 16)], gateway.tls())
        http = [process for replica in pair for process in replica.processes]
        proxies = [p for p in psutil.Process().children(recursive=True) if p.name() == "nginx"]
        closed(load, AT_ONCE, requests // 4)
        before = [processor_s(each) for each in (proxies, http)]
        full = closed(load, AT_ONCE, requests)
        gateway_s, http_s = (
            (processor_s(each) - was) / requests
            for each, was in zip((proxies, http), before, strict=True)
        )
        cores = psutil.cpu_count() or 1
        costs = Costs(full.client_s / requests, gateway_s, http_s)
        fleet = Fleet(2, gateways=len(proxies) - 1, cores=cores)
        most = capacity(costs, fleet)
        rows = [_row(load, costs, fleet, share * most, requests) for share in SHARES]
    return {
        "seconds": {"client": costs.client, "gateway": gateway_s, "http": http_s},
        "cores": cores,
        "capacity": {"predicted": most, "measured": full.rate},
        "rows": rows,
    }


def _row(load: Load, costs: Costs, fleet: Fleet, rate: float, requests: int) -> dict[str, Any]:
    found: Found = opened(load, rate, requests, connections=2 * AT_ONCE)
    predicted = simulate(costs, fleet, rate, 10 * requests)
    return {
        "rate": rate,
        "measured": _quantiles(np.array(found.latencies_s)),
        "predicted": _quantiles(predicted),
    }


def _quantiles(latencies_s: Seconds) -> dict[str, float]:
    return {name: float(np.quantile(latencies_s, q)) for name, q in QUANTILES.items()}
