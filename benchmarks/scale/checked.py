"""Real replicas, whose engines answer at once: several HTTP processes, and nginx before two."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import psutil

from benchmarks.scale.load import Load, closed, opened
from benchmarks.scale.pieces import request
from benchmarks.scale.queues import Costs, Fleet, Seconds, capacity, simulate
from benchmarks.scale.quiet import Round, quietest
from benchmarks.scale.replicas import replicas
from benchmarks.serving.servers import Site
from tests.docker.gateway import nginx

# Not more than docker/nginx.conf lets a key send in one millisecond (`burst`).
AT_ONCE = 32
ROUNDS = 5
# How long a quiet round is waited for, of one or two processes in turn.
TURN_S = 20.0
# Of what the simulation says two cores carry.
SHARES = (0.3, 0.6, 0.8)
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def compare_processes(site: Site, requests: int) -> dict[str, Any]:
    """Returns the requests a second of one and of two HTTP processes, and their ratio."""
    policies = site.folder / "policies.yaml"
    found: dict[str, list[Round]] = {"1": [], "2": []}
    with (
        replicas(site.model, policies, 1, 1) as (one,),
        replicas(site.model, policies, 1, 2) as (two,),
    ):
        for turn in range(-1, ROUNDS):
            for name, replica in (("1", one), ("2", two)):
                once = partial(
                    closed, Load(replica.port, [request("plain", 16)]), AT_ONCE, requests
                )
                rounds = quietest(once, {"http": replica.processes}, 1, TURN_S)
                found[name] += rounds if turn >= 0 else []
    rates = {name: [each.found.rate for each in rounds] for name, rounds in found.items()}
    ratios = np.divide(rates["2"], rates["1"])
    return {
        "rates": rates,
        "http_s": {name: _median(rounds, "http") for name, rounds in found.items()},
        "others": max(each.others for rounds in found.values() for each in rounds),
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
        proxies = [p for p in psutil.Process().children(recursive=True) if p.name() == "nginx"]
        http = [process for replica in pair for process in replica.processes]
        groups = {"gateway": proxies, "http": http}
        closed(load, AT_ONCE, requests)
        full = quietest(partial(closed, load, AT_ONCE, requests), groups, ROUNDS)
        client_s = float(np.median([each.found.client_s for each in full])) / requests
        costs = Costs(client_s, _median(full, "gateway"), _median(full, "http"))
        fleet = Fleet(2, gateways=len(proxies) - 1, cores=psutil.cpu_count())
        most = capacity(costs, fleet)
        rows = [_row(load, groups, costs, fleet, share * most, requests) for share in SHARES]
    return {
        "seconds": {"client": costs.client, "gateway": costs.gateway, "http": costs.http},
        "cores": fleet.cores,
        "others": max(each.others for each in full),
        "capacity": {
            "predicted": most,
            "measured": float(np.median([each.found.rate for each in full])),
        },
        "rows": rows,
    }


def _row(
    load: Load,
    groups: Mapping[str, Sequence[psutil.Process]],
    costs: Costs,
    fleet: Fleet,
    rate: float,
    requests: int,
) -> dict[str, Any]:
    once = partial(opened, load, rate, requests, connections=AT_ONCE)
    rounds = quietest(once, groups, ROUNDS)
    measured = np.concatenate([each.found.latencies_s for each in rounds])
    cores = fleet.cores or 1
    predicted = np.concatenate(
        [
            simulate(costs, fleet._replace(cores=cores - each.others), np.array(each.found.sent_s))
            for each in rounds
        ]
    )
    return {
        "rate": rate,
        "others": float(np.median([each.others for each in rounds])),
        "measured": _quantiles(measured),
        "predicted": _quantiles(predicted),
    }


def _median(rounds: list[Round], name: str) -> float:
    return float(np.median([each.taken_s[name] for each in rounds]))


def _quantiles(latencies_s: Seconds) -> dict[str, float]:
    return {name: float(np.quantile(latencies_s, q)) for name, q in QUANTILES.items()}
