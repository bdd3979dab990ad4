"""Throughput and latency against stock vLLM: interleaved rounds on one machine, as ratios.

Both servers hold the same checkpoint, whose every answer opens with a control token. Stock decodes
it like any other and is given one token more, so both run as many decoding steps. Throughput is
measured first, then the latency of requests of one token, one at a time. Rounds are short and
follow each other in turn, for the machine's own speed changes within seconds; and both servers are
started several times, for one start can be faster than the next by more than the rounds show. While
one server is measured, the other one's processes are stopped: vLLM's engine and worker go on
spinning for a second after their last request, and would take the cores from it. With `--against`
the server of another checkout is measured too: what a change costs.
"""

import argparse
import asyncio
import json
import signal
import statistics
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt
import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.manifest import load_manifest
from tests.e2e.servers import Server, rheostat_server, stock_server
from training.demo_data.render import render

Body = dict[str, Any]
Values = npt.NDArray[np.float64]
Rounds = dict[str, list[float]]
STOCK, OURS, REPORTED, OTHER = "stock", "rheostat", "rheostat, report", "the other checkout"
WARM_UP = 3
RESAMPLES = 4000


class Estimate(NamedTuple):
    """A median over all rounds, with its 95 % interval (bootstrap of starts, then of rounds)."""

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
        OTHER: {"refusal": never},
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


class Client:
    """Sends one contender's requests.

    Args:
        more_tokens: What its answers need for the decision.
    """

    def __init__(self, server: Server, requests: Iterator[Body], more_tokens: int) -> None:
        self.server = server
        self._requests = requests
        self._more_tokens = more_tokens

    async def together(self, requests: int, at_once: int, tokens: int) -> float:
        """Returns the requests a second of a round."""
        gate = asyncio.Semaphore(at_once)
        async with self._session() as session:

            async def post() -> None:
                async with gate:
                    await self._post(session, tokens)

            await self._post(session, 1)  # wakes the engine up
            start = time.perf_counter()
            await asyncio.gather(*(post() for _ in range(requests)))
            return requests / (time.perf_counter() - start)

    async def alone(self, requests: int) -> float:
        """Returns the median milliseconds of an answer of one token, one request at a time."""
        async with self._session() as session:
            await self._post(session, 1)
            return 1000 * statistics.median([await self._post(session, 1) for _ in range(requests)])

    def _session(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.server.url, timeout=120)

    async def _post(self, session: httpx.AsyncClient, tokens: int) -> float:
        body = {**next(self._requests), "max_tokens": tokens + self._more_tokens}
        start = time.perf_counter()
        answer = await session.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return time.perf_counter() - start


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


def estimate(starts: Values) -> Estimate:
    """Returns the median and its interval; ``[starts, rounds]``."""
    rng = np.random.default_rng(0)
    count, rounds = starts.shape
    drawn = rng.integers(count, size=(RESAMPLES, count, 1))
    medians = np.median(
        starts[drawn, rng.integers(rounds, size=(RESAMPLES, count, rounds))], (1, 2)
    )
    low, high = np.quantile(medians, (0.025, 0.975))
    return Estimate(float(np.median(starts)), float(low), float(high))


def in_turn(
    clients: dict[str, Client],
    measure: Callable[[Client], Coroutine[Any, Any, float]],
    rounds: int,
    what: str,
    console: Console,
) -> Rounds:
    """Measures all contenders round by round; the first rounds warm up and do not count."""
    names = list(clients)
    values: Rounds = {name: [] for name in names}
    for turn in track(range(-WARM_UP, rounds), what, console=console):
        first = turn % len(names)
        order = [*names[first:], *names[:first]]
        for name in order[:: 1 if turn // len(names) % 2 else -1]:
            with running(clients[name].server):
                value = asyncio.run(measure(clients[name]))
            if turn >= 0:
                values[name].append(value)
    return values


def show(console: Console, per_s: dict[str, Values], alone_ms: dict[str, Values]) -> dict[str, Any]:
    """Prints and returns medians over the rounds, and comparisons with 95 % intervals.

    Args:
        per_s: Requests a second of each contender, ``[starts, rounds]``.
        alone_ms: Milliseconds of a request alone, likewise.
    """
    levels = Table(title="medians over the rounds")
    for column in ("", "requests/s", "one token alone, ms"):
        levels.add_column(column)
    results: dict[str, Any] = {}
    for name in per_s:
        fast, slow = float(np.median(per_s[name])), float(np.median(alone_ms[name]))
        results[name] = {"requests_per_s": fast, "alone_ms": slow}
        levels.add_row(name, f"{fast:.0f}", f"{slow:.2f}")
    pairs = Table(title="compared round by round, with 95 % intervals; medians of each start")
    for column in ("", "throughput", "by start", "added latency, ms", "by start"):
        pairs.add_column(column)
    compared = [(OURS, STOCK), (REPORTED, STOCK), (REPORTED, OURS), (OURS, OTHER), (OTHER, STOCK)]
    for own, other in (pair for pair in compared if per_s.keys() >= {*pair}):
        ratios, added = per_s[own] / per_s[other], alone_ms[own] - alone_ms[other]
        ratio_starts, added_starts = np.median(ratios, 1), np.median(added, 1)
        results[f"{own} / {other}"] = {
            "throughput_ratio": estimate(ratios)._asdict() | {"starts": ratio_starts.tolist()},
            "added_ms": estimate(added)._asdict() | {"starts": added_starts.tolist()},
        }
        pairs.add_row(
            f"{own} / {other}",
            "{:.3f} [{:.3f}, {:.3f}]".format(*estimate(ratios)),
            ", ".join(f"{value:.3f}" for value in ratio_starts),
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*estimate(added)),
            ", ".join(f"{value:+.2f}" for value in added_starts),
        )
    console.print(levels, pairs)
    return results


def measured(options: argparse.Namespace, start: int, console: Console) -> tuple[Rounds, Rounds]:
    """Starts both servers and returns requests a second, and milliseconds alone."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(TemporaryDirectory()))
        what = f"start {start + 1} of {options.starts}"
        with console.status(f"{what}: starting the servers"):
            ours = stack.enter_context(rheostat_server(options.checkpoint, logs / "ours.log"))
            stock = stack.enter_context(stock_server(options.checkpoint, logs / "stock.log"))
            servers = {STOCK: stock, OURS: ours, REPORTED: ours}
            if options.against is not None:
                servers[OTHER] = stack.enter_context(
                    rheostat_server(options.checkpoint, logs / "other.log", source=options.against)
                )
        requests = bodies(options.checkpoint)
        clients = {
            name: Client(server, requests[name], int(name == STOCK))
            for name, server in servers.items()
        }
        for server in {*servers.values()}:
            _signal(server, signal.SIGSTOP)
            stack.callback(_signal, server, signal.SIGCONT)  # a stopped one could not end
        together = partial(
            Client.together,
            requests=options.requests,
            at_once=options.at_once,
            tokens=options.tokens,
        )
        per_s = in_turn(clients, together, options.rounds, f"{what}: throughput", console)
        alone = partial(Client.alone, requests=options.alone)
        alone_ms = in_turn(clients, alone, options.alone_rounds, f"{what}: latency", console)
    return per_s, alone_ms


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--starts", type=int, default=8, help="of both servers")
    parser.add_argument("--rounds", type=int, default=10, help="a start, of requests at once")
    parser.add_argument("--requests", type=int, default=96, help="a round and contender")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--alone-rounds", type=int, default=30, help="a start, one at a time")
    parser.add_argument("--alone", type=int, default=6, help="requests a round and contender")
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout of this project"
    )
    parser.add_argument("--out", type=Path, help="also write the figures there as JSON")
    options = parser.parse_args()
    console = Console()
    starts = [measured(options, start, console) for start in range(options.starts)]
    per_s, alone_ms = (
        {name: np.array([one[name] for one in rounds]) for name in rounds[0]}
        for rounds in zip(*starts, strict=True)
    )
    results = show(console, per_s, alone_ms)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
