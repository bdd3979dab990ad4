import asyncio
import json
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from models.errors import EvaluationError
from tests.training.conftest import WriteRows, small_rows
from training.client import RheostatClient
from training.config.data import named_sources
from training.measure.evaluate import Questions, evaluate_server, force
from training.measure.report import Report, Share

NAMES = ["safety", "humanizing"]
TEXTS = {
    "safety": "I won't help to steal lamps.",
    "humanizing": "I'm an AI and cannot love lamps.",
    None: "Shops sell lamps every day.",
}


def _run(coroutine: Coroutine[Any, Any, Report]) -> Report:
    return asyncio.run(coroutine)


def _client(handler: Any) -> RheostatClient:
    transport = httpx.MockTransport(handler)
    return RheostatClient(httpx.AsyncClient(base_url="http://fake", transport=transport))


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    """Refuses what speaks of stealing, unless the dials say otherwise."""
    assert body["temperature"] == 0
    assert body["refusal"]["report"] is True
    prompt = body["messages"][-1]["content"]
    dials = body["refusal"].get("categories", {})
    forced = [name for name, dial in dials.items() if dial == "always"]
    left = "safety" if "steal" in prompt else None
    category = (forced[0] if forced else None) if dials else left
    margins = {"safety": 2.0 if "steal" in prompt else -3.0, "humanizing": -4.0}
    text = TEXTS[category]
    message = {"role": "assistant", "content": text, "refusal": None}
    if category:
        message = {"role": "assistant", "content": None, "refusal": text}
    decisions = {
        name: {"probability": 0.5, "margin": margin, "bias": None, "refused": name == category}
        for name, margin in margins.items()
    }
    report = {"refused": category is not None, "category": category, "decisions": decisions}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "refusal_report": report}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
    }


def _serve(request: httpx.Request) -> httpx.Response:
    if request.url.path == "/v1/models":
        model = {"id": "m", "object": "model", "created": 0, "owned_by": "us"}
        return httpx.Response(200, json={"object": "list", "data": [model]})
    if request.url.path == "/v1/refusal/categories":
        data = [{"name": name, "description": "", "token": f"[refuse:{name}]"} for name in NAMES]
        return httpx.Response(200, json={"object": "list", "data": data})
    assert request.url.path == "/v1/chat/completions"
    return httpx.Response(200, json=_chat(json.loads(request.content)))


def _questions(data: Path, limit: int | None = None) -> Questions:
    return Questions(named_sources(data), named_sources(data), limit)


async def _evaluate(client: RheostatClient, data: Path, limit: int | None = None) -> Report:
    return await evaluate_server(client, _questions(data, limit), Console(stderr=True))


def test_evaluation_counts_what_the_server_did(write_rows: WriteRows) -> None:
    # Eight rows of "safety", all refused; eight of "humanizing" and sixteen to answer, none is.
    report = _run(_evaluate(_client(_serve), write_rows(small_rows())))

    assert report.rows == 32
    assert report.refused == {"safety": Share(8, 8), "humanizing": Share(0, 8)}
    assert report.falsely_refused == Share(0, 16)
    assert report.right_category == Share(8, 8)
    assert report.own_fidelity == Share(32, 32)
    assert report.flip_to_respond == Share(8, 8)
    assert sum(share.total for share in report.flip_to_refuse.values()) == 24
    assert all(share.hits == share.total > 0 for share in report.flip_to_refuse.values())
    assert report.margins["safety"]["0.5"] == 2.0


def test_limit_draws_that_many_rows(write_rows: WriteRows) -> None:
    assert _run(_evaluate(_client(_serve), write_rows(small_rows()), limit=10)).rows == 10


def test_forcing_sets_every_dial() -> None:
    assert force("answer", NAMES) == {"safety": "never", "humanizing": "never"}
    assert force("humanizing", NAMES) == {"safety": "never", "humanizing": "always"}


def test_refused_request_says_what_the_server_said(write_rows: WriteRows) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/chat/completions":
            return httpx.Response(422, json={"error": {"message": "no such dial"}})
        return _serve(request)

    with pytest.raises(EvaluationError, match=r"422.*no such dial"):
        _run(_evaluate(_client(handler), write_rows(small_rows())))


def test_server_that_reports_nothing_is_not_ours(write_rows: WriteRows) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        response = _serve(request)
        if request.url.path != "/v1/chat/completions":
            return response
        body = response.json()
        del body["choices"][0]["refusal_report"]
        return httpx.Response(200, json=body)

    with pytest.raises(EvaluationError, match="refusal_report"):
        _run(_evaluate(_client(handler), write_rows(small_rows())))


def test_server_without_our_categories_is_not_ours(write_rows: WriteRows) -> None:
    def handler(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"hello": "world"})

    with pytest.raises(EvaluationError, match="list of refusal categories"):
        _run(_evaluate(_client(handler), write_rows(small_rows())))


def test_earlier_refusals_carry_their_category(write_rows: WriteRows) -> None:
    sent: list[list[dict[str, Any]]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/chat/completions":
            sent.append(json.loads(request.content)["messages"])
        return _serve(request)

    turns = [
        {"role": "user", "content": "Do you love me?"},
        {"role": "assistant", "content": "I'm an AI.", "category": "humanizing"},
        {"role": "user", "content": "What are hats?"},
        {"role": "assistant", "content": "Clothes.", "category": None},
    ]
    _run(_evaluate(_client(handler), write_rows([{"messages": turns}, *small_rows()])))

    earlier = [messages[1] for messages in sent if len(messages) == 3]
    assert (
        earlier
        == [{"role": "assistant", "refusal": "I'm an AI.", "refusal_category": "humanizing"}] * 2
    )
