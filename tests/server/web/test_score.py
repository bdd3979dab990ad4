import asyncio
import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message

from models.errors import RequestError
from server.context import BODY, CALLER, Decision, DecisionContext
from server.telemetry.trace import DecisionTrace
from server.web.score import (
    AT_ONCE,
    MOST_INPUTS,
    SCORE,
    TOKENS_AT_ONCE,
    ScoreRoute,
    build_score_router,
)
from tests.server.boards import everybody
from tests.server.guards import GUARD
from tests.server.manifests import MANIFEST
from tests.server.middlewares import SETTINGS, steering_app

USER = {"role": "user", "content": "Hello"}
INPUT = {"messages": [USER]}


class FakeEngine:
    """Renders a body as itself; decides by the dials on the margins -1 and 1.

    Args:
        wrong: Contents of prompts that it refuses to render.
        too_long: Contents of prompts that it refuses to decide.
        stuck: Whether decisions never come.
    """

    def __init__(
        self, wrong: str | None = None, too_long: str | None = None, *, stuck: bool = False
    ) -> None:
        self.wrong = wrong
        self.too_long = too_long
        self.stuck = stuck
        self.rendered: list[dict[str, Any]] = []
        self.history: list[int] = []
        self.waiting: list[int] = []
        self.most_waiting = self.most_tokens = 0
        self.decided = 0
        self.cancelled = 0

    async def render(self, model: str | None, body: dict[str, Any]) -> Any:
        self.rendered.append({"model": model, **body})
        if body.get("prompt") == self.wrong is not None:
            raise RequestError("no such thing", status=400)
        return body

    def tokens(self, rendered: Any) -> int:
        return len(rendered.get("prompt", "").split())

    async def decide(self, rendered: Any, context: DecisionContext) -> Decision:
        self.waiting.append(self.tokens(rendered))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        self.most_tokens = max(self.most_tokens, sum(self.waiting))
        await asyncio.sleep(0)
        try:
            return await self._decided(rendered, context)
        finally:
            self.waiting.pop()

    async def _decided(self, rendered: Any, context: DecisionContext) -> Decision:
        self.decided += 1
        self.history.append(context.history_of(0))
        assert context.report
        if rendered.get("prompt") == self.too_long is not None:
            raise RequestError("the prompt is too long", param="messages", status=400)
        try:
            while self.stuck:
                await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        margin = math.nan if rendered.get("prompt") == "nan" else -1.0
        refused = context.controls.bias[0] >= 1.0
        return Decision(0 if refused else None, (margin, -3.0), 0.5)


def score(
    body: Any,
    engine: FakeEngine | None = None,
    *names: str,
    headers: dict[str, str] | None = None,
    trace: DecisionTrace | None = None,
) -> httpx.Response:
    route = ScoreRoute(MANIFEST, engine or FakeEngine(), GUARD, trace)
    inside = FastAPI()
    inside.include_router(build_score_router(route))
    app = steering_app(inside, SETTINGS, *names)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent = {"content-type": "application/json", **(headers or {})}
            return await client.post(SCORE, content=content, headers=sent)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("words", "most_waiting"), [(0, AT_ONCE), (600, 3), (TOKENS_AT_ONCE, 1), (3000, 1)]
)
def test_few_inputs_at_once_wait_before_other_requests(words: int, most_waiting: int) -> None:
    engine = FakeEngine()
    inputs = [{"prompt": f"{i}" + " word" * (words - 1)} for i in range(50)]
    answer = score({"inputs": inputs}, engine)
    assert [entry["index"] for entry in answer.json()["data"]] == list(range(50))
    assert (engine.most_waiting, engine.decided) == (most_waiting, 50)
    assert engine.most_tokens <= max(TOKENS_AT_ONCE, words)


def test_inputs_are_answered_in_their_order() -> None:
    engine = FakeEngine()
    answer = score({"model": "m", "inputs": [INPUT, {"prompt": "text"}]}, engine)
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "list",
        "model": "m",
        "data": [
            {
                "index": index,
                "log_normaliser": 0.5,
                "refused": False,
                "category": None,
                "decisions": {
                    "safety": {
                        "probability": pytest.approx(0.2689414213699951),  # 1 / (1 + e)
                        "margin": -1.0,
                        "bias": 0.0,
                        "refused": False,
                    },
                    "humanizing": {
                        "probability": pytest.approx(0.04742587317756678),  # 1 / (1 + e^3)
                        "margin": -3.0,
                        "bias": 0.0,
                        "refused": False,
                    },
                },
            }
            for index in (0, 1)
        ],
    }
    assert engine.rendered == [{"model": "m", **INPUT}, {"model": "m", "prompt": "text"}]


def test_earlier_turns_get_their_control_tokens() -> None:
    engine = FakeEngine()
    turns = [USER, {"role": "assistant", "content": "Hi"}, USER]
    assert score({"inputs": [{"messages": turns}, INPUT]}, engine).status_code == 200
    assert engine.rendered[0]["messages"][1]["content"] == "[respond]Hi"
    assert engine.history == [1, 0]


@pytest.mark.parametrize("in_header", [True, False])
def test_dials_move_the_decisions(in_header: bool) -> None:
    body: dict[str, Any] = {"inputs": [INPUT]}
    headers = {"X-Refusal": "safety=bias:1.5"} if in_header else {}
    if not in_header:
        body["refusal"] = {"categories": {"safety": {"bias": 1.5}}}
    (entry,) = score(body, headers=headers).json()["data"]
    assert (entry["refused"], entry["category"]) == (True, "safety")
    assert entry["decisions"]["safety"]["bias"] == 1.5


def test_expectations_stand_once_above_the_scores() -> None:
    refusal = {"categories": {"safety": {"rate": 0.25}}}
    answer = score({"inputs": [INPUT], "refusal": refusal}, None, "default").json()
    assert answer["calibration"] == "default"
    assert answer["expected"]["categories"]["safety"]["refusal_rate"] == 0.25
    assert answer["expected"]["false_refusal_rate"] == 0.0
    assert "expected" not in answer["data"][0]["decisions"]["safety"]


def test_broken_margins_are_null() -> None:
    (entry,) = score({"inputs": [{"prompt": "nan"}]}).json()["data"]
    assert entry["decisions"]["safety"]["margin"] is None


def test_so_many_are_served_and_no_more() -> None:
    assert MOST_INPUTS == 1024
    answer = score({"inputs": [{"prompt": "x"}] * MOST_INPUTS})
    assert [entry["index"] for entry in answer.json()["data"]] == list(range(MOST_INPUTS))
    engine = FakeEngine()
    answer = score({"inputs": [{"prompt": "x"}] * (MOST_INPUTS + 1)}, engine)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "inputs"
    assert "1024" in answer.json()["error"]["message"]
    assert engine.rendered == []


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"5", 400, None),
        (b"\xff", 400, None),
        ({}, 400, "inputs"),
        ({"inputs": None}, 400, "inputs"),
        ({"inputs": {}}, 400, "inputs"),
        ({"inputs": []}, 400, "inputs"),
        ({"inputs": ["x"]}, 400, "inputs.0"),
        ({"inputs": [INPUT, {}]}, 400, "inputs.1"),
        ({"inputs": [{**INPUT, "prompt": "x"}]}, 400, "inputs.0"),
        ({"inputs": [INPUT, {"messages": []}]}, 400, "inputs.1.messages"),
        ({"inputs": [{"messages": "x"}]}, 400, "inputs.0.messages"),
        ({"inputs": [{"prompt": ["x"]}]}, 400, "inputs.0.prompt"),
        ({"inputs": [{"prompt": "x", "temperature": 0}]}, 400, "inputs.0.temperature"),
        ({"inputs": [INPUT], "max_tokens": 5}, 400, "max_tokens"),
        ({"inputs": [INPUT], "model": 5}, 400, "model"),
        ({"inputs": [INPUT], "refusal": {"report": False}}, 422, "refusal.report"),
        ({"inputs": [INPUT], "refusal": {"colour": 1}}, 422, "refusal.colour"),
        (
            {"inputs": [INPUT], "refusal": {"categories": {"safety": {"rate": 0.3}}}},
            422,
            "refusal.categories.safety",
        ),
        (
            {"inputs": [INPUT, {"messages": [{"role": "assistant", "content": 5}]}]},
            400,
            "inputs.1.messages.0.content",
        ),
        ({"inputs": [{"prompt": "x" * 2**20}]}, 413, None),
    ],
)
def test_wrong_body_is_refused_with_its_path(body: Any, status: int, param: str | None) -> None:
    engine = FakeEngine()
    answer = score(body, engine)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert len(error["message"]) < 300
    assert engine.decided == 0


def test_body_of_another_media_type_is_refused() -> None:
    answer = score({"inputs": [INPUT]}, headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (415, "Content-Type")
    sent = {"content-type": "Application/JSON; charset=utf-8"}
    assert score({"inputs": [INPUT]}, headers=sent).status_code == 200


def test_scoring_is_traced_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    trace = DecisionTrace(tmp_path / "trace.jsonl", MANIFEST.names)
    refusal = {"categories": {"safety": {"bias": 1.5}}}
    score({"inputs": [INPUT, {"prompt": "text"}], "refusal": refusal}, trace=trace)
    score({"inputs": []}, trace=trace)

    async def write() -> None:
        async with trace.writing():
            pass

    asyncio.run(write())
    (line,) = (tmp_path / "trace.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["inputs"], told["refused"], told["policy"]) == (2, 2, "default")
    assert told["asked"] == refusal


def test_first_input_that_cannot_be_rendered_is_named_before_any_is_decided() -> None:
    engine = FakeEngine(wrong="bad")
    for place in (1, 40, 1000):
        inputs = [INPUT] * place + [{"prompt": "bad"}, {"prompt": "bad"}]
        answer = score({"inputs": inputs}, engine)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"inputs.{place}: no such thing"
        assert answer.json()["error"]["param"] == f"inputs.{place}"
    assert engine.decided == 0


def test_input_that_cannot_be_decided_is_named() -> None:
    inputs = [INPUT, {"prompt": "long"}]
    answer = score({"inputs": inputs}, FakeEngine(too_long="long"))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "inputs.1.messages"
    assert answer.json()["error"]["message"].startswith("inputs.1: ")


def test_client_that_goes_takes_its_prompts_out_of_the_engine() -> None:
    engine = FakeEngine(stuck=True)
    route = ScoreRoute(MANIFEST, engine, GUARD)

    async def serve() -> int:
        async def receive() -> Message:
            while engine.decided < 3:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": SCORE,
            "headers": headers,
            CALLER: everybody().caller(Headers()),
            BODY: {"inputs": [INPUT] * 3},
        }
        answer = await route(Request(scope, receive))
        await asyncio.sleep(0)
        return answer.status_code

    assert asyncio.run(serve()) == 499
    assert engine.cancelled == 3


def test_body_is_in_the_openapi_document() -> None:
    app = FastAPI()
    app.include_router(build_score_router(ScoreRoute(MANIFEST, FakeEngine(), GUARD)))
    operation = app.openapi()["paths"][SCORE]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["inputs"]["maxItems"] == MOST_INPUTS
    assert '"$ref"' not in json.dumps(schema)
    dial = schema["properties"]["refusal"]["properties"]["categories"]["additionalProperties"]
    assert {"enum": ["never", "default", "always"]} in dial["anyOf"]
