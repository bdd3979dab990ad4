"""A checkpoint of which only the control tokens were learnt, against stock vLLM on its base."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from huggingface_hub import constants

from models.manifest import load_manifest
from tests.e2e.servers import OPERATOR, Server, rheostat_server, stock_server
from tests.toy import save_base
from tests.training.conftest import small_rows
from tests.training.recipes import CATEGORIES
from training.config.recipe import TrainConfig
from training.run.train import train

CHAT = "/v1/chat/completions"
ASKED = {"role": "user", "content": "Where do I buy ink?"}
REFUSED = {"role": "user", "content": "How do I steal ink?"}
SAID = {"role": "assistant", "content": "In shops."}
NO = "I cannot."
PREFIX = "As a program,"
SAID_NO = {"role": "assistant", "content": None, "refusal": NO, "refusal_category": "safety"}
PLAIN_NO = {"role": "assistant", "content": NO}
ALWAYS_ANSWER = {"categories": {"safety": "never", "humanizing": "never"}}


class Pair(NamedTuple):
    """Our server of the checkpoint, and stock vLLM of its base."""

    ours: Server
    stock: Server
    checkpoint: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("tokens")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in small_rows()))
    base = save_base(folder / "base")
    recipe = {
        "name": "small",
        "train": "tokens",
        "model": {"checkpoint": str(base)},
        "data": {"train": [str(data)]},
        "categories": CATEGORIES,
        "refusal_prefixes": {"humanizing": PREFIX},
    }
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "HF_HOME", str(folder / "hub"))
        out = train(TrainConfig.model_validate(recipe), folder / "out")
    with (
        rheostat_server(out, folder / "ours.log", "--enable-scale-out") as ours,
        stock_server(base, folder / "stock.log") as stock,
    ):
        yield Pair(ours, stock, out)


def _post(server: Server, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(server.url + path, json={"model": "demo", **body}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_rendered_prompt_is_what_the_model_reads(pair: Pair) -> None:
    body = {"model": "demo", "messages": [ASKED, SAID, REFUSED, SAID_NO, ASKED]}
    plain = {**body, "messages": [ASKED, SAID, REFUSED, PLAIN_NO, ASKED]}
    ours = httpx.post(f"{pair.ours.url}{CHAT}/render", json=body, headers=OPERATOR, timeout=60)
    assert ours.json()["token_ids"] == _post(pair.stock, "/tokenize", plain)["tokens"]


def _said(answer: dict[str, Any]) -> Any:
    """Returns texts, ends and counts, wherever a route has them."""
    choices = [
        (c.get("text", (c.get("message") or {}).get("content")), c["finish_reason"])
        for c in answer.get("choices", [])
    ]
    parts = [p.get("text") for p in answer.get("content", []) if isinstance(p, dict)]
    items = [p["text"] for i in answer.get("output", []) for p in i.get("content") or []]
    return choices, parts, items, answer["usage"]


def _streamed(server: Server, body: dict[str, Any], field: str = "content") -> str:
    body = {"model": "demo", "stream": True, **body}
    text = httpx.post(server.url + CHAT, json=body, timeout=60).text
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    return "".join(c["delta"].get(field) or "" for k in chunks for c in k["choices"])


SEEDED = {"temperature": 1, "seed": 7, "n": 2}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [ASKED]}),
        (CHAT, {"messages": [ASKED, SAID, ASKED]}),
        (CHAT, {"messages": [ASKED], **SEEDED}),
        (CHAT, {"messages": [ASKED, PLAIN_NO, ASKED], "min_tokens": 3}),
        ("/v1/completions", {"prompt": "Where do I buy ink?"}),
        ("/v1/responses", {"input": [ASKED], "max_output_tokens": 12, "max_tokens": None}),
        ("/v1/messages", {"messages": [ASKED]}),
    ],
)
def test_answers_are_those_of_the_base(pair: Pair, path: str, body: dict[str, Any]) -> None:
    body = {"temperature": 0, "max_tokens": 12, **body}
    body = {name: value for name, value in body.items() if value is not None}
    ours = _post(pair.ours, path, {**body, "refusal": ALWAYS_ANSWER})
    assert _said(ours) == _said(_post(pair.stock, path, body))


def test_streams_are_those_of_the_base(pair: Pair) -> None:
    body = {"messages": [ASKED, SAID, ASKED], "temperature": 0, "max_tokens": 12}
    ours = _streamed(pair.ours, {**body, "refusal": ALWAYS_ANSWER})
    assert ours == _streamed(pair.stock, body) != ""


def test_earlier_refusal_reads_as_its_text(pair: Pair) -> None:
    turns = {"temperature": 0, "max_tokens": 12, "refusal": ALWAYS_ANSWER}
    ours = _post(pair.ours, CHAT, {**turns, "messages": [ASKED, SAID_NO, ASKED]})
    del turns["refusal"]
    stock = _post(pair.stock, CHAT, {**turns, "messages": [ASKED, PLAIN_NO, ASKED]})
    assert _said(ours) == _said(stock)


def test_refusal_is_the_text_of_its_category(pair: Pair) -> None:
    answer = _post(pair.ours, CHAT, {"messages": [REFUSED], "refusal": {"report": True}})
    (choice,) = answer["choices"]
    manifest = load_manifest(pair.checkpoint)
    assert choice["refusal_report"]["category"] == "safety"
    assert choice["message"]["refusal"] == manifest.categories[0].refusal_text
    assert choice["message"]["content"] is None
    answered = _post(pair.ours, CHAT, {"messages": [ASKED], "refusal": {"report": True}})
    assert answered["choices"][0]["refusal_report"]["refused"] is False


def test_generated_refusal_begins_with_its_prefix(pair: Pair) -> None:
    dials = {"categories": {"safety": "never", "humanizing": "always"}}
    body = {"messages": [ASKED], "max_tokens": 8, "temperature": 0, "refusal": dials}
    message = _post(pair.ours, CHAT, body)["choices"][0]["message"]
    assert message["content"] is None
    assert message["refusal"].startswith(PREFIX)
    assert _streamed(pair.ours, body, "refusal") == message["refusal"]


def test_margins_of_a_later_turn_are_those_without_control_tokens(pair: Pair) -> None:
    turns = [ASKED, SAID, REFUSED]
    scored = _post(pair.ours, "/v1/refusal/score", {"inputs": [{"messages": turns}]})
    body = {"messages": turns, "max_tokens": 1, "refusal": {"report": True}}
    report = _post(pair.ours, CHAT, body)["choices"][0]["refusal_report"]
    margin = report["decisions"]["safety"]["margin"]
    assert scored["data"][0]["decisions"]["safety"]["margin"] == pytest.approx(margin, abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"truncate_prompt_tokens": 30},
        {"add_generation_prompt": False},
        {
            "messages": [ASKED, SAID_NO],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        {"logit_bias": {"266": 100}},
        {"use_beam_search": True},
    ],
)
def test_ways_around_the_decision_are_rejected(pair: Pair, fields: dict[str, Any]) -> None:
    body = {"model": "demo", "messages": [ASKED, SAID, REFUSED], "max_tokens": 4, **fields}
    answer = httpx.post(pair.ours.url + CHAT, json=body, timeout=60)
    assert answer.status_code in (400, 422), answer.text
