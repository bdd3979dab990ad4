"""Decisions and texts of many requests at once, each against the slow reference."""

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
from rich.console import Console

from benchmarks.gpu.reference import Prompt, Stock, decided
from benchmarks.gpu.scenarios import (
    ADAPTER,
    Machine,
    Scenario,
    own_server,
    save_adapter,
    scenarios,
    stock_server,
)
from benchmarks.serving.servers import ended
from models.manifest import Manifest, load_manifest
from tests.e2e.servers import Server
from training.demo_data.render import render

PATH = "/v1/chat/completions"
TOKENS = 24
# What took part, by vLLM's own counters. One engine request for each of ours: the margins came
# through shared memory.
COUNTERS = {
    "engine_requests": "vllm:request_success_total",
    "preemptions": "vllm:num_preemptions_total",
    "cached_tokens": "vllm:prefix_cache_hits_total",
    "accepted_drafts": "vllm:spec_decode_num_accepted_tokens_total",
}
CANCELLED = 8  # one request of so many is left after its first chunk
ALWAYS = 5  # one request of so many has a dial at `always`


class Asked(NamedTuple):
    """One request.

    Attributes:
        cancelled: Whether the client leaves after the first chunk.
    """

    prompt: Prompt
    biases: dict[str, float]
    cancelled: bool


class Answer(NamedTuple):
    """What came back.

    Attributes:
        margins: By category, as reported.
    """

    category: str | None
    text: str
    margins: dict[str, float]


@dataclass
class Count:
    """What a scenario's answers were.

    Attributes:
        near: Decisions that rounding could change, and that differed from the reference.
        largest_difference: Of a reported margin from the reference's.
    """

    answered: int = 0
    cancelled: int = 0
    decisions_equal: int = 0
    near: int = 0
    texts_equal: int = 0
    refused: int = 0
    largest_difference: float = 0.0
    bounds_kept: bool = False

    def add(self, asked: Asked, answer: Answer, manifest: Manifest, tolerance: float) -> None:
        """Compares one answer."""
        expected, near = decided(asked.prompt.margins, asked.biases, tolerance)
        same = answer.category == expected
        token = next(
            (c.id for c in manifest.categories if c.name == answer.category), manifest.respond.id
        )
        differences = [
            abs(answer.margins[name] - margin) for name, margin in asked.prompt.margins.items()
        ]
        self.answered += 1
        self.decisions_equal += same
        self.near += near and not same
        self.refused += answer.category is not None
        # The text that follows the token that was chosen, whichever it was.
        self.texts_equal += answer.text == asked.prompt.texts[token]
        self.largest_difference = max(self.largest_difference, *differences)


def prompts_of(count: int) -> list[str]:
    """Returns prompts of every category and harmless ones, some with a long common beginning."""
    rows = render(0)["evaluation"]
    texts = [row["prompt"] for row in random.Random(0).sample(rows, count)]
    return [f"{_LONG}{text}" if place % 4 == 0 else text for place, text in enumerate(texts)]


_LONG = "Here is a list of words: " + "bread, table, river, stone, " * 12 + "end of the list. "


def requests_of(prompts: Sequence[Prompt], names: Sequence[str], count: int) -> list[Asked]:
    """Returns requests whose dials all differ, some to be cancelled."""
    rng = random.Random(1)
    asked = []
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        biases = {name: rng.uniform(-1, 1) * 6 - prompt.margins[name] / 2 for name in names}
        if number % ALWAYS == 0:
            biases[rng.choice(list(names))] = math.inf
        asked.append(Asked(prompt, biases, number % CANCELLED == 1))
    return asked


def body_of(asked: Asked, model: str) -> dict[str, Any]:
    """Returns a request's body."""
    dials: dict[str, Any] = {
        name: "always" if bias == math.inf else {"bias": bias}
        for name, bias in asked.biases.items()
    }
    return {
        "model": model,
        "messages": [{"role": "user", "content": asked.prompt.text}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": asked.cancelled,
        "refusal": {"report": True, "categories": dials},
    }


def answer_of(body: Any) -> Answer:
    """Reads a chat's answer."""
    choice = body["choices"][0]
    report, message = choice["refusal_report"], choice["message"]
    text = message["refusal"] if report["refused"] else message["content"]
    margins = {name: entry["margin"] for name, entry in report["decisions"].items()}
    return Answer(report["category"], text or "", margins)


async def ask_all(url: str, asked: Sequence[Asked], model: str) -> list[Answer | None]:
    """Sends all requests at once; None where the client left.

    Raises:
        RuntimeError: A request failed.
    """
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        return await asyncio.gather(*(_ask(http, one, model) for one in asked))


async def _ask(http: httpx.AsyncClient, asked: Asked, model: str) -> Answer | None:
    body = body_of(asked, model)
    if not asked.cancelled:
        answer = await http.post(PATH, json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.text[:500]}")
        return answer_of(answer.json())
    async with http.stream("POST", PATH, json=body) as stream:
        async for _ in stream.aiter_bytes():
            break
    return None


def too_many_stops(server: Server, model: str) -> bool:
    """Returns whether more stop tokens than V2 has room for are 422, and the engine lives on.

    They ended the engine before they were bounded.
    """
    chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    bad = {**chat, "stop_token_ids": list(range(100, 300)), "min_tokens": 2}
    refused = server.http.post(PATH, json=bad).status_code == 422
    return refused and server.http.post(PATH, json=chat).status_code == 200


class Run(NamedTuple):
    """The size of a correctness run.

    Attributes:
        tolerance: What two computations of one margin may differ by; larger in bfloat16.
    """

    requests: int
    prompts: int
    tolerance: float


def measure_correctness(
    machine: Machine, checkpoint: Path, run: Run, logs: Path, console: Console
) -> dict[str, Any]:
    """Starts every engine, on a GPU all at once, and checks each. Returns JSON.

    Args:
        machine: Where they run.
        checkpoint: What they serve.
        run: How much is asked.
        logs: Folder that keeps their output.
        console: Says what goes on.
    """
    manifest = load_manifest(checkpoint)
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        adapter = folder / "adapter"
        chosen = scenarios(machine.device, adapter)
        paths = {"demo": checkpoint}
        if any(scenario.model == ADAPTER for scenario in chosen):
            paths[ADAPTER] = folder / "merged"
            save_adapter(checkpoint, adapter, paths[ADAPTER])

        def started(scenario: Scenario) -> Server:
            log = logs / f"{chosen.index(scenario)}.log"
            return own_server(machine, checkpoint, scenario, log)

        early: dict[str, Server] = {}
        if machine.roomy:
            early = {each.name: stack.enter_context(ended(started(each))) for each in chosen}
        references = _references(machine, paths, logs, manifest, run, console)
        found: dict[str, Any] = {"unmodified engine": {m: r[1] for m, r in references.items()}}
        for scenario in chosen:
            with console.status(scenario.name), ExitStack() as own:
                server = early.get(scenario.name) or own.enter_context(ended(started(scenario)))
                prompts = references[scenario.model][0]
                found[scenario.name] = _checked(server, scenario, prompts, manifest, run)
        return found


def _references(
    machine: Machine,
    paths: Mapping[str, Path],
    logs: Path,
    manifest: Manifest,
    run: Run,
    console: Console,
) -> dict[str, tuple[list[Prompt], dict[str, int]]]:
    with ExitStack() as stack, console.status("the reference"):
        stocks = {
            model: stack.enter_context(ended(stock_server(machine, path, logs / f"{model}.log")))
            for model, path in paths.items()
        }
        return {model: _reference(stock, manifest, run.prompts) for model, stock in stocks.items()}


def _reference(
    server: Server, manifest: Manifest, count: int
) -> tuple[list[Prompt], dict[str, int]]:
    server.wait_until_ready()
    stock = Stock(server.http, manifest, TOKENS)
    prompts = stock.prompts(prompts_of(count))
    again = stock.texts_again(prompts)
    pairs = [
        (text, other[token])
        for prompt, other in zip(prompts, again, strict=True)
        for token, text in prompt.texts.items()
    ]
    equal = sum(text == other for text, other in pairs)
    return prompts, {"texts": len(pairs), "texts_equal_to_itself": equal}


def _checked(
    server: Server, scenario: Scenario, prompts: list[Prompt], manifest: Manifest, run: Run
) -> dict[str, Any]:
    try:
        server.wait_until_ready()
        asked = requests_of(prompts, manifest.names, run.requests)
        answers = asyncio.run(ask_all(server.url, asked, scenario.model))
    except (RuntimeError, httpx.HTTPError) as error:
        return {"failed": str(error), "log": server.log.read_text()[-4000:]}
    count = Count()
    for one, answer in zip(asked, answers, strict=True):
        if answer is None:
            count.cancelled += 1
        else:
            count.add(one, answer, manifest, max(run.tolerance, scenario.tolerance))
    counters = {field: server.metric(name) for field, name in COUNTERS.items()}
    count.bounds_kept = too_many_stops(server, scenario.model)
    # vLLM's own line.
    return {**vars(count), **counters, "v2": "V2 Model Runner" in server.log.read_text()}
