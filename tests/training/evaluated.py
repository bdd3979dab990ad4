"""A server in this process that decides by words, and what an evaluation of it reports."""

import asyncio
import functools
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from models.controls import Controls, Rule
from models.decision import refused_category
from tests.training.conftest import small_rows
from training.client import RheostatClient
from training.config.data import named_sources
from training.evaluation.evaluate import Run, evaluate_server
from training.evaluation.questions import Questions
from training.evaluation.report import Report

NAMES = ("safety", "humanizing")
WORDS = {"safety": "steal", "humanizing": "you love"}
LOG_NORMALISER = 2.0
TEXTS = {
    "safety": "I won't help to steal lamps.",
    "humanizing": "I'm an AI and cannot love lamps.",
    None: "Shops sell lamps every day.",
}
HASHES = {"weights": "a" * 64, "template": "b" * 64, "tokenizer": "c" * 64}

Body = dict[str, Any]
Handler = Callable[[httpx.Request], httpx.Response]


def margins_of(text: str) -> list[float]:
    """Returns 2 where a category's word is there, else -3: "LOVE" is another word."""
    return [2.0 if WORDS[name] in text else -3.0 for name in NAMES]


def bias_of(dial: Any, margin: float = 0.0) -> float:
    """Returns the bias of a dial; a rate's is what puts the margin 2 to its share of 0..4."""
    if isinstance(dial, str):
        return {"always": math.inf, "never": -math.inf}[dial]
    if "rate" in dial:
        return -2.5 if dial["rate"] < 0.5 else 0.0
    bias: float = dial["bias"]
    return bias


def decided(body: Body, text: str) -> tuple[list[float], list[float], str | None]:
    """Returns margins, biases and decision, by the same arithmetic as the worker."""
    refusal = body.get("refusal", {})
    dials = refusal.get("categories", {})
    margins = margins_of(text)
    biases = [bias_of(dials[name]) if name in dials else 0.0 for name in NAMES]
    rule = Rule[(refusal.get("decision") or "greedy").upper()]
    controls = Controls(rule, tuple(biases), (True, True))
    warm, seed = body.get("temperature", 0.0), body.get("seed")
    column = refused_category(LOG_NORMALISER, margins, controls, warm, seed)
    return margins, biases, None if column is None else NAMES[column]


def decision_report(margins: list[float], biases: list[float], category: str | None) -> Body:
    words = {math.inf: "always", -math.inf: "never"}
    decisions = {
        name: {"margin": margin, "bias": words.get(bias, bias), "refused": name == category}
        for name, margin, bias in zip(NAMES, margins, biases, strict=True)
    }
    return {"refused": category is not None, "category": category, "decisions": decisions}


def scored(body: Body) -> Body:
    data = []
    for index, entry in enumerate(body["inputs"]):
        report = decision_report(*decided(body, entry["messages"][-1]["content"]))
        data.append({"index": index, "log_normaliser": LOG_NORMALISER, **report})
    expected = {name: {"reachable": True} for name in NAMES}
    return {"data": data, "expected": {"categories": expected}}


def chat(body: Body) -> Body:
    margins, biases, category = decided(body, body["messages"][-1]["content"])
    text = TEXTS[category]
    message = {"content": None, "refusal": text} if category else {"content": text}
    report = decision_report(margins, biases, category)
    return {"choices": [{"message": message, "refusal_report": report}]}


def policy() -> Body:
    dials = {name: {"default": {"bias": 0.0}} for name in NAMES}
    return {"name": "default", "decision": "greedy", "enforce": True, "categories": dials}


def serve(request: httpx.Request) -> httpx.Response:
    """Answers as a server with a calibration does."""
    fixed: Mapping[str, Body] = {
        "/v1/models": {"data": [{"id": "m"}]},
        "/v1/refusal/categories": {"data": [{"name": n} for n in NAMES], "hashes": HASHES},
        "/v1/refusal/policies": {"data": [policy()]},
        "/v1/refusal/calibration": {"name": "default", "created": "today"},
    }
    path = request.url.path
    if path in fixed:
        return httpx.Response(200, json=fixed[path])
    body = json.loads(request.content)
    answer = {"/v1/refusal/score": scored, "/v1/chat/completions": chat}[path](body)
    return httpx.Response(200, json=answer)


def client(handler: Handler = serve) -> RheostatClient:
    transport = httpx.MockTransport(handler)
    return RheostatClient(httpx.AsyncClient(base_url="http://fake", transport=transport))


def evaluated(
    data: Path,
    handler: Handler = serve,
    *,
    taught: bool = True,
    out: Path | None = None,
    **questions: Any,
) -> Report:
    """Evaluates the server on one file."""
    sources = named_sources(data)
    asked = Questions(sources, sources if taught else (), **questions)
    run = Run("http://fake", "rheostat evaluate", out=out)
    return asyncio.run(evaluate_server(client(handler), asked, run, Console(stderr=True)))


@functools.cache
def small_report() -> Report:
    """Returns the report of `small_rows` in a set named `rows`, made once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in small_rows()))
        return evaluated(path)
