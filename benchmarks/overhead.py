"""Throughput and latency against stock vLLM: interleaved rounds on one machine, as ratios.

Both servers hold the same checkpoint, whose every answer opens with a control token. Stock decodes
it like any other and is given one token more, so both run as many decoding steps: that is the
measure. "stock, token given" finds the control token in its prompt and saves that step; it is shown
for what the step costs.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap

from models.manifest import load_manifest
from tests.e2e.servers import rheostat_server, stock_server
from training.demo_data.render import render

Body = dict[str, Any]


class Round(NamedTuple):
    """One contender's round.

    Attributes:
        per_s: Requests a second at the given concurrency.
        median_s: Median seconds of a request, one at a time.
    """

    per_s: float
    median_s: float


class Estimate(NamedTuple):
    """A median over the rounds, with its 95 % interval (BCa bootstrap)."""

    median: float
    low: float
    high: float


def bodies(checkpoint: Path, tokens: int) -> dict[str, list[Body]]:
    """Returns each contender's requests: stock twice, ours, ours with a report."""
    manifest = load_manifest(checkpoint)
    prompts = [row["prompt"] for row in render(0)["evaluation"] if row["category"] is None]
    never = {"categories": dict.fromkeys(manifest.names, "never")}
    common = {"model": "demo", "temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    prefilled = {"add_generation_prompt": False, "continue_final_message": True}

    def stock(prompt: str) -> Body:
        turns = [{"role": "user", "content": prompt}]
        return {**common, "messages": turns, "max_tokens": tokens + 1}

    def given(prompt: str) -> Body:
        turns = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": manifest.respond.token},
        ]
        return {**common, **prefilled, "messages": turns}

    def ours(prompt: str, **refusal: Any) -> Body:
        turns = [{"role": "user", "content": prompt}]
        return {**common, "messages": turns, "refusal": {**never, **refusal}}

    return {
        "stock": [stock(prompt) for prompt in prompts],
        "stock, token given": [given(prompt) for prompt in prompts],
        "rheostat": [ours(prompt) for prompt in prompts],
        "rheostat, report": [ours(prompt, report=True) for prompt in prompts],
    }


async def run_round(url: str, requests: Iterator[Body], count: int, at_once: int) -> Round:
    """Measures one contender once."""
    gate = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def post() -> float:
            async with gate:
                start = time.perf_counter()
                answer = await client.post("/v1/chat/completions", json=next(requests))
                answer.raise_for_status()
                return time.perf_counter() - start

        start = time.perf_counter()
        await asyncio.gather(*(post() for _ in range(count)))
        per_s = count / (time.perf_counter() - start)
        gate = asyncio.Semaphore(1)
        alone = [await post() for _ in range(max(10, count // 8))]
    return Round(per_s, statistics.median(alone))


def cycle(requests: list[Body]) -> Iterator[Body]:
    """Repeats the requests for ever."""
    while True:
        yield from requests


def _estimate(values: list[float]) -> Estimate:
    interval = bootstrap((values,), np.median, rng=0).confidence_interval
    return Estimate(statistics.median(values), float(interval.low), float(interval.high))


def show(console: Console, rounds: dict[str, list[Round]]) -> dict[str, dict[str, Any]]:
    """Prints and returns medians, and the medians of the rounds' ratios to stock."""
    table = Table(title="against stock vLLM, same run, interleaved rounds; 95 % intervals")
    for column in ("contender", "requests/s", "ratio", "one at a time, ms", "added, ms"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    results = {}
    for name, own in rounds.items():
        pairs = list(zip(own, rounds["stock"], strict=True))
        ratio = _estimate([r.per_s / s.per_s for r, s in pairs])
        added = _estimate([1000 * (r.median_s - s.median_s) for r, s in pairs])
        per_s = statistics.median(r.per_s for r in own)
        latency_ms = 1000 * statistics.median(r.median_s for r in own)
        results[name] = {
            "requests_per_s": per_s,
            "throughput_ratio": ratio,
            "latency_ms": latency_ms,
            "added_ms": added,
        }
        table.add_row(
            name,
            f"{per_s:.0f}",
            "{:.3f} ({:.3f} to {:.3f})".format(*ratio),
            f"{latency_ms:.2f}",
            "{:+.2f} ({:+.2f} to {:+.2f})".format(*added),
        )
    console.print(table)
    return results


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--requests", type=int, default=128, help="a round and contender")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, help="also write the figures there as JSON")
    arguments = parser.parse_args()
    console = Console()
    requests = {k: cycle(v) for k, v in bodies(arguments.checkpoint, arguments.tokens).items()}
    names = list(requests)
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    with ExitStack() as stack:
        logs = Path(stack.enter_context(TemporaryDirectory()))
        with console.status("starting two servers"):
            ours = stack.enter_context(rheostat_server(arguments.checkpoint, logs / "ours.log"))
            stock = stack.enter_context(stock_server(arguments.checkpoint, logs / "stock.log"))
        size = (arguments.requests, arguments.at_once)
        for turn in track(range(-1, arguments.rounds), "measuring", console=console):
            # Each contender is first, second, … equally often: what a round leaves to the next one
            # is nobody's alone.
            first = turn % len(requests)
            for name in [*names[first:], *names[:first]]:
                url = stock.url if name.startswith("stock") else ours.url
                measured = asyncio.run(run_round(url, requests[name], *size))
                if turn >= 0:  # the first turn warms up
                    rounds[name].append(measured)
    results = show(console, rounds)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
