"""The tables, and what many requests a second take, computed from the pieces."""

from collections.abc import Iterator
from math import ceil
from typing import Any

import numpy as np

from benchmarks.scale.checked import QUANTILES
from benchmarks.scale.queues import Costs, Fleet, at_random, simulate
from benchmarks.serving.report import table

# How busy a process may be: the table of waiting says what follows.
BUSY = 0.6
UTILISATIONS = (0.5, 0.6, 0.7, 0.8, 0.9)
SIMULATED = 100_000
# The fleet that is simulated: streamed answers of 64 tokens that take the engine two seconds, and
# four HTTP processes a replica.
SIZED_TOKENS = "64"
ENGINE_S = 2.0
PROCESSES = 4
REPLICAS = (8, 32, 128)


def sizing_tables(found: dict[str, Any], rate: int, simulated: int = SIMULATED) -> str:
    """Returns all tables that the results allow, as Markdown.

    Args:
        found: Results by part.
        rate: Requests a second to size for.
        simulated: How many requests a simulation has.
    """
    parts = []
    if "pieces" in found:
        parts += [("Pieces", ["piece", "measured"], _pieces(found["pieces"]))]
    if "processes" in found:
        head = ["HTTP processes", "requests/s", "processor time a request, ms"]
        parts += [("HTTP processes, on two cores", head, _processes(found["processes"]))]
    if "check" in found:
        head = ["requests/s", "cores that others took", "", *QUANTILES]
        parts += [("Two replicas behind nginx, ms", head, _check(found["check"]))]
    if "pieces" in found and "check" in found:
        pieces, gateway_s = found["pieces"], found["check"]["seconds"]["gateway"]
        title = f"What {rate:,} requests a second take"
        head = ["tokens", "", "HTTP, cores", "HTTP processes", "nginx, cores"]
        parts += [(title, head, _sizes(pieces, gateway_s, rate))]
        title = f"Waiting for nginx and HTTP, at {rate:,} requests a second (simulated), ms"
        head = ["busy", "HTTP processes", "nginx's workers", *QUANTILES]
        parts += [(title, head, _waiting(pieces, gateway_s, rate, simulated))]
        head = ["replicas", "series", "scraped every 15 s, kB/s"]
        parts += [("Metrics", head, _metrics(pieces))]
    return "\n\n".join(f"### {title}\n\n{table(head, rows)}" for title, head, rows in parts) + "\n"


def _pieces(pieces: dict[str, Any]) -> Iterator[list[str]]:
    for kind, seconds in pieces["instant"].items():
        yield [f"HTTP layer, engine answers at once, {kind}, 16 tokens", _ms(seconds)]
    for tokens, kinds in pieces["engine"]["http_s"].items():
        for kind, seconds in kinds.items():
            yield [f"HTTP process before a real engine, {kind}, {tokens} tokens", _ms(seconds)]
    for name, us in pieces["functions"].items():
        yield [name, f"{us:.1f} µs"]
    for tenants, seconds in pieces["policies"].items():
        yield [f"a policy file of {int(tenants):,} tenants is read", f"{seconds:.2f} s"]
    shown = pieces["engine"]["metrics"]
    series = ", ".join(f"{name} {count}" for name, count in shown["series"].items())
    yield ["series of a server with 2 policies", series]
    yield ["a scrape", f"{shown['bytes'] / 1e3:.0f} kB, {_ms(shown['seconds'])}"]


def _processes(found: dict[str, Any]) -> Iterator[list[str]]:
    for name, rates in found["rates"].items():
        yield [name, f"{np.median(rates):.0f}", f"{1e3 * found['http_s'][name]:.2f}"]
    low, high = found["range"]
    yield ["ratio", f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})", ""]


def _check(found: dict[str, Any]) -> Iterator[list[str]]:
    for row in found["rows"]:
        for kind in ("measured", "predicted"):
            values = (f"{1e3 * row[kind][name]:.1f}" for name in QUANTILES)
            yield [f"{row['rate']:.0f}", f"{row['others']:.2f}", kind, *values]
    most = found["capacity"]
    others = f"{found['others']:.2f}"
    yield [f"most: {most['measured']:.0f}", others, "measured", "", "", ""]
    yield [f"most: {most['predicted']:.0f}", "0", "predicted", "", "", ""]


def _sizes(pieces: dict[str, Any], gateway_s: float, rate: int) -> Iterator[list[str]]:
    for tokens, kinds in pieces["engine"]["http_s"].items():
        for kind, seconds in kinds.items():
            cores = rate * seconds
            proxy = rate * gateway_s / BUSY
            yield [tokens, kind, f"{cores:.0f}", f"{ceil(cores / BUSY)}", f"{proxy:.1f}"]


def _waiting(
    pieces: dict[str, Any], gateway_s: float, rate: int, simulated: int
) -> Iterator[list[str]]:
    http_s = pieces["engine"]["http_s"][SIZED_TOKENS]["streamed"]
    costs = Costs(0, gateway_s, http_s, ENGINE_S)
    for busy in UTILISATIONS:
        replicas = ceil(rate * http_s / busy / PROCESSES)
        gateways = ceil(rate * gateway_s / busy)
        fleet = Fleet(replicas, PROCESSES, gateways)
        took_s = simulate(costs, fleet, at_random(rate, simulated))
        waited_s = took_s - ENGINE_S - gateway_s - http_s
        cells = (f"{1e3 * np.quantile(waited_s, q):.1f}" for q in QUANTILES.values())
        yield [f"{busy:.0%}", f"{replicas * PROCESSES:,}", str(gateways), *cells]


def _metrics(pieces: dict[str, Any]) -> Iterator[list[str]]:
    shown = pieces["engine"]["metrics"]
    for count in REPLICAS:
        series = count * sum(shown["series"].values())
        yield [str(count), f"{series:,}", f"{count * shown['bytes'] / 15e3:.0f}"]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"
