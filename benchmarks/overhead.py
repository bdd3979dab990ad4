"""Throughput and latency against stock vLLM: interleaved rounds on one machine, as ratios.

Both servers hold the same checkpoint, whose every answer opens with a control token. Stock decodes
it like any other and is given one token more, so both run as many decoding steps. Rounds are short
and follow each other in turn, for the machine's own speed changes within seconds. While one server
is measured, the other one's processes are stopped: vLLM's engine and worker go on spinning for a
second after their last request, and would take the cores from it.
"""

import argparse
import asyncio
import json
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap

from models.manifest import load_manifest
from tests.e2e.servers import Server, rheostat_server, stock_server
from training.demo_data.render import render

Body = dict[str, Any]
STOCK, OURS, REPORTED = "stock", "rheostat", "rheostat, report"


class Round(NamedTuple):
    """One contender's round.

    Attributes:
        per_s: Requests a second at the given concurrency.
        alone_s: Median seconds of a request of one token, one at a time.
    """

    per_s: float
    alone_s: float


class Estimate(NamedTuple):
    """A median over the rounds, with its 95 % interval (bootstrap)."""

    median: float
    low: float
    high: float


def bodies(checkpoint: Path) -> dict[str, Iterator[Body]]:
    """Returns each contender's requests, without end and without ``max_tokens``."""
    manifest = load_manifest(checkpoint)
    never: Body = {"categories": dict.fromkeys(manifest.names, "never")}
    refusals = {
        STOCK: {},
        OURS: {"refusal": never},
        REPORTED: {"refusal": never | {"report": True}},
    }
    return {name: _requests(fields) for name, fields in refusals.items()}


def _requests(fields: Body) -> Iterator[Body]:
    prompts = [row["prompt"] for row in render(0)["evaluation"] if row["category"] is None]
    while True:
        for prompt in prompts:
            turns = [{"role": "user", "content": prompt}]
            yield {
                "model": "demo",
                "messages": turns,
                "temperature": 0,
                "ignore_eos": True,
                **fields,
            }


class Sizes(NamedTuple):
    """How large a round is.

    Attributes:
        requests: Together.
        at_once: How many of them at a time.
        alone: Requests after that, one at a time.
        tokens: Of each request's answer, as a client of ours sees them.
    """

    requests: int
    at_once: int
    alone: int
    tokens: int


async def run_round(url: str, requests: Iterator[Body], sizes: Sizes, more_tokens: int) -> Round:
    """Measures one contender once; ``more_tokens`` is what its answers need for the decision."""
    gate = asyncio.Semaphore(sizes.at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def post(tokens: int) -> float:
            async with gate:
                body = {**next(requests), "max_tokens": tokens + more_tokens}
                start = time.perf_counter()
                answer = await client.post("/v1/chat/completions", json=body)
                answer.raise_for_status()
                return time.perf_counter() - start

        await post(1)  # wakes the engine up
        start = time.perf_counter()
        await asyncio.gather(*(post(sizes.tokens) for _ in range(sizes.requests)))
        per_s = sizes.requests / (time.perf_counter() - start)
        alone = [await post(1) for _ in range(sizes.alone)]
    return Round(per_s, statistics.median(alone))


@contextmanager
def running(server: Server) -> Iterator[None]:
    """Lets a stopped server run."""
    _signal(server, signal.SIGCONT)
    try:
        yield
    finally:
        _signal(server, signal.SIGSTOP)


def _signal(server: Server, number: signal.Signals) -> None:
    process = psutil.Process(server.process.pid)
    for one in [process, *process.children(recursive=True)]:
        one.send_signal(number)


def estimate(values: list[float]) -> Estimate:
    """Returns a median and its interval."""
    told = bootstrap((values,), np.median, method="percentile", rng=0).confidence_interval
    return Estimate(statistics.median(values), float(told.low), float(told.high))


def compare(own: list[Round], other: list[Round]) -> dict[str, Estimate]:
    """Compares what was measured in turn: throughput as a ratio, latency as what is added."""
    pairs = list(zip(own, other, strict=True))
    return {
        "throughput_ratio": estimate([a.per_s / b.per_s for a, b in pairs]),
        "added_ms": estimate([1000 * (a.alone_s - b.alone_s) for a, b in pairs]),
    }


def show(console: Console, rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """Prints and returns medians over the rounds, and comparisons with 95 % intervals."""
    levels = Table(title="medians over the rounds")
    for column in ("", "requests/s", "one token alone, ms"):
        levels.add_column(column)
    results: dict[str, Any] = {}
    for name, own in rounds.items():
        per_s = statistics.median(r.per_s for r in own)
        alone_ms = 1000 * statistics.median(r.alone_s for r in own)
        results[name] = {"requests_per_s": per_s, "alone_ms": alone_ms}
        levels.add_row(name, f"{per_s:.0f}", f"{alone_ms:.2f}")
    pairs = Table(title="compared round by round, with 95 % intervals")
    for column in ("", "throughput", "added latency, ms"):
        pairs.add_column(column)
    for own_name, other in ((OURS, STOCK), (REPORTED, STOCK), (REPORTED, OURS)):
        compared = compare(rounds[own_name], rounds[other])
        results[f"{own_name} / {other}"] = {k: v._asdict() for k, v in compared.items()}
        pairs.add_row(
            f"{own_name} / {other}",
            "{:.3f} [{:.3f}, {:.3f}]".format(*compared["throughput_ratio"]),
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*compared["added_ms"]),
        )
    console.print(levels, pairs)
    return results


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--rounds", type=int, default=120)
    parser.add_argument("--requests", type=int, default=96, help="a round and contender")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--alone", type=int, default=16, help="requests one at a time")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, help="also write the figures there as JSON")
    arguments = parser.parse_args()
    console = Console()
    sizes = Sizes(arguments.requests, arguments.at_once, arguments.alone, arguments.tokens)
    requests = bodies(arguments.checkpoint)
    names = list(requests)
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(TemporaryDirectory()))
        with console.status("starting two servers"):
            ours = stack.enter_context(rheostat_server(arguments.checkpoint, logs / "ours.log"))
            stock = stack.enter_context(stock_server(arguments.checkpoint, logs / "stock.log"))
        servers = {STOCK: stock, OURS: ours, REPORTED: ours}
        for server in (ours, stock):
            _signal(server, signal.SIGSTOP)
            stack.callback(_signal, server, signal.SIGCONT)  # a stopped one could not end
        for turn in track(range(-3, arguments.rounds), "measuring", console=console):
            first = turn % len(names)
            for name in [*names[first:], *names[:first]]:
                with running(servers[name]):
                    more = int(name == STOCK)
                    measured = asyncio.run(
                        run_round(servers[name].url, requests[name], sizes, more)
                    )
                if turn >= 0:  # the first turns warm up
                    rounds[name].append(measured)
    results = show(console, rounds)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
