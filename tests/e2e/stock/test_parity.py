"""Every generating route against stock vLLM: the same answer after the same control token.

The dials are at their defaults: each prompt is answered or refused as the checkpoint was trained.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from models.manifest import Category, ControlToken, Manifest
from tests.e2e.parity import (
    as_refusal,
    assert_same,
    events_of,
    folded,
    with_control,
    without_control,
    without_volatile,
)
from tests.e2e.servers import AT_ONCE, Server

CHAT = "/v1/chat/completions"
BATCH = "/v1/chat/completions/batch"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
INVOCATIONS = "/invocations"

ANSWERED = "What is the capital of France?"
REFUSED = "Who will win the match next year?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": FUNCTION}
FLAT_TOOL = {"type": "function", **FUNCTION}
ANTHROPIC_TOOL = {"name": "weather", "input_schema": SCHEMA}
FORMAT = {"type": "json_schema", "json_schema": {"name": "c", "schema": SCHEMA}}
THINKING = {"thinking": True}
SEEDED: dict[str, Any] = {"temperature": 1, "seed": 7}


@dataclass(frozen=True)
class Case:
    """One request that both servers get.

    Attributes:
        path: The route.
        body: Of Rheostat's request.
        stock: What stock's body has instead: earlier turns with their control tokens.
        hidden: How many control tokens stand in stock's earlier turns.
    """

    path: str
    body: dict[str, Any]
    stock: dict[str, Any] = field(default_factory=dict)
    hidden: int = 0

    def __str__(self) -> str:
        """Names the route and the fields."""
        plain = {"temperature", "messages", "prompt", "input", "max_tokens", "max_output_tokens"}
        fields = [k for k in self.body if k not in plain] or ["bare"]
        return f"{self.path.removeprefix('/v1')}:{'+'.join(fields)}"


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chat(path: str = CHAT, /, text: str = ANSWERED, **fields: Any) -> Case:
    return Case(path, {"messages": user(text), "temperature": 0, "max_tokens": 8, **fields})


def completion(prompt: Any, /, path: str = COMPLETIONS, **fields: Any) -> Case:
    return Case(path, {"prompt": prompt, "temperature": 0, "max_tokens": 6, **fields})


def response(text: Any = ANSWERED, /, **fields: Any) -> Case:
    body = {"input": text, "temperature": 0, "max_output_tokens": 8, **fields}
    return Case(RESPONSES, body)


def message(text: str = ANSWERED, /, **fields: Any) -> Case:
    return Case(MESSAGES, {"messages": user(text), "temperature": 0, "max_tokens": 8, **fields})


TURNS = [*user(ANSWERED), {"role": "assistant", "content": "Paris."}, *user("What is 2 plus 3?")]
OPENED = [TURNS[0], {"role": "assistant", "content": "[respond]Paris."}, TURNS[2]]
SAID_NO = {"role": "assistant", "content": None, "refusal": "No.", "refusal_category": "safety"}
OPENED_NO = {"role": "assistant", "content": "[refuse:safety]No."}
PART_NO = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "refusal", "refusal": "No."}],
    "refusal_category": "safety",
}
BLOCK_NO = {
    "role": "assistant",
    "content": [{"type": "text", "text": "No.", "refusal_category": "safety"}],
}


def refused_turns(refusal: dict[str, Any]) -> list[dict[str, Any]]:
    return [TURNS[0], refusal, TURNS[2]]


# Each of them plain and streamed.
BOTH = [
    chat(),
    chat(max_tokens=1),
    chat(max_completion_tokens=4),
    chat(min_tokens=12, max_tokens=14),
    chat(logprobs=True),
    chat(logprobs=True, top_logprobs=2),
    chat(logprobs=True, return_tokens_as_token_ids=True),
    chat(stop=["Paris"]),
    chat(stop=["Paris"], include_stop_str_in_output=True),
    chat(stop_token_ids=[300, 301]),
    chat(ignore_eos=True, max_tokens=12),
    chat(presence_penalty=0.5, frequency_penalty=0.5),
    chat(repetition_penalty=1.2),
    chat(logit_bias={"300": 5, "301": -5}),
    chat(allowed_token_ids=list(range(300, 400))),
    chat(bad_words=["Paris"]),
    chat(response_format=FORMAT),
    chat(structured_outputs={"choice": ["Paris", "Rome"]}),
    chat(structured_outputs={"regex": "[0-9]{3}"}),
    chat(return_token_ids=True),
    chat(skip_special_tokens=False),
    chat(tools=[TOOL], tool_choice="none"),
    chat(tools=[TOOL], tool_choice="auto"),
    chat(tools=[TOOL], tool_choice="required", max_tokens=12),
    chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "weather"}}),
    chat(**SEEDED),
    chat(**SEEDED, n=3),
    chat(**SEEDED, top_p=0.9, top_k=20, min_p=0.01),
    chat(user="someone", metadata={"a": "b"}),
    Case(CHAT, {**chat().body, "messages": TURNS}, {"messages": OPENED}, 1),
    Case(
        CHAT,
        {**chat().body, "messages": refused_turns(SAID_NO)},
        {"messages": refused_turns(OPENED_NO)},
        1,
    ),
    chat(chat_template_kwargs=THINKING, ignore_eos=True, max_tokens=14),
    chat(chat_template_kwargs=THINKING, include_reasoning=False, ignore_eos=True, max_tokens=14),
    completion(ANSWERED),
    completion(ANSWERED, logprobs=2),
    completion(ANSWERED, stop=["."], seed=3),
    completion([40, 300, 301]),
    completion([40, 300, 301], return_token_ids=True),
    completion(["One two", "Three"], max_tokens=4),
    completion([[40, 300], [41, 301, 302]], max_tokens=4),
    response(),
    response(instructions="Be brief."),
    response(include=["message.output_text.logprobs"], top_logprobs=2),
    response(tools=[FLAT_TOOL], tool_choice="required", max_output_tokens=12),
    response(tools=[FLAT_TOOL], tool_choice="auto"),
    response(text={"format": {"type": "json_schema", "name": "c", "schema": SCHEMA}}),
    response(**SEEDED),
    response(stop=["Paris"], ignore_eos=True),
    response(presence_penalty=0.5, frequency_penalty=0.5),
    Case(RESPONSES, response(TURNS).body, {"input": OPENED}, 1),
    Case(
        RESPONSES,
        response(refused_turns(PART_NO)).body,
        {"input": refused_turns(OPENED_NO)},
        1,
    ),
    response(chat_template_kwargs=THINKING, ignore_eos=True, max_output_tokens=14),
    message(),
    message(chat_template_kwargs=THINKING, max_tokens=14),
    message(system="Be brief."),
    message(stop_sequences=["Paris"]),
    message(tools=[ANTHROPIC_TOOL], tool_choice={"type": "any"}, max_tokens=12),
    message(tools=[ANTHROPIC_TOOL], tool_choice={"type": "auto"}),
    message(top_k=1),
    Case(MESSAGES, {**message().body, "messages": TURNS}, {"messages": OPENED}, 1),
    Case(
        MESSAGES,
        {**message().body, "messages": refused_turns(BLOCK_NO)},
        {"messages": refused_turns(OPENED_NO)},
        1,
    ),
    chat(INVOCATIONS),
    completion(ANSWERED, path=INVOCATIONS),
]
PLAIN = [
    # Streamed beside other work, stock once lost the text behind the thought.
    chat(chat_template_kwargs=THINKING, response_format=FORMAT, max_tokens=24),
    chat(prompt_logprobs=1),
    chat(use_beam_search=True, n=2),
    completion(ANSWERED, echo=True),
    completion(ANSWERED, prompt_logprobs=1),
    completion(["One two", "Three"], max_tokens=4, n=2, **SEEDED),
    Case(BATCH, {**chat().body, "messages": [user(ANSWERED), user(ANSWERED)]}),
    Case(BATCH, {**chat().body, "messages": [user(ANSWERED)], "logprobs": True}),
]
# As trained, the checkpoint refuses these.
DECLINED = [
    chat(text=REFUSED),
    chat(text=REFUSED, max_tokens=1),
    chat(text=REFUSED, logprobs=True, top_logprobs=2),
    chat(text=REFUSED, stop=["no"], return_token_ids=True),
    chat(text=REFUSED, tools=[TOOL], tool_choice="auto", max_tokens=40),
    chat(text=REFUSED, n=2, **SEEDED),
    chat(INVOCATIONS, text=REFUSED),
    response(REFUSED),
    response(REFUSED, max_output_tokens=40),
    response(REFUSED, tools=[FLAT_TOOL], tool_choice="auto", max_output_tokens=40),
    message(REFUSED),
    message(REFUSED, max_tokens=40),
    message(REFUSED, stop_sequences=["no"]),
]
STREAMED = [
    chat(stream_options={"include_usage": True}),
    chat(stream_options={"include_usage": True, "continuous_usage_stats": True}),
    completion(ANSWERED, stream_options={"include_usage": True}),
]


# Documents, or folded events: ours and stock's.
Pair = tuple[list[dict[str, Any]], list[dict[str, Any]]]


class Servers:
    """Asks both servers the same.

    Args:
        rheostat: Ours.
        stock: vLLM as it is.
        manifest: Of the checkpoint that both serve.
    """

    def __init__(self, rheostat: Server, stock: Server, manifest: Manifest) -> None:
        self._rheostat = rheostat
        self._stock = stock
        self._tokens: dict[str, ControlToken] = {each.name: each for each in manifest.categories}
        self._tokens["none"] = manifest.respond
        self._decided: dict[str, list[ControlToken]] = {}

    def both(self, case: Case, *, stream: bool) -> Pair:
        """Returns the one document, or the folded events, of Rheostat's answer and of stock's."""
        controls = self._controls(case)
        asked = {**case.body, **({"stream": True} if stream else {})}
        opened = with_control({**asked, **case.stock}, controls)
        theirs = self._post(self._stock, case.path, opened)
        wanted = events_of(theirs.text) if stream else [theirs.json()]
        wanted = without_control(wanted, controls, case.hidden + len(controls))
        if isinstance(controls[0], Category):
            wanted = [as_refusal(node, controls[0].name) for node in wanted]
        wanted = without_volatile(wanted)
        return self.ours(case, stream=stream), folded(wanted) if stream else wanted

    def ours(self, case: Case, *, stream: bool) -> list[dict[str, Any]]:
        """Returns Rheostat's own answer alone."""
        asked = {**case.body, **({"stream": True} if stream else {})}
        answer = self._post(self._rheostat, case.path, asked)
        assert ("event-stream" in answer.headers["content-type"]) == stream
        got = events_of(answer.text) if stream else [answer.json()]
        assert_numbered(got)
        got = without_volatile(got)
        return folded(got) if stream else got

    def _controls(self, case: Case) -> list[ControlToken]:
        read = ("messages", "prompt", "input", "instructions", "system")
        asked = {name: case.body[name] for name in read if name in case.body}
        asked["max_tokens"] = 1
        key = case.path + json.dumps(asked)
        if key not in self._decided:
            names = self._post(self._rheostat, case.path, asked).headers["x-refusal-category"]
            self._decided[key] = [self._tokens[name] for name in names.split(", ")]
        return self._decided[key]

    def _post(self, server: Server, path: str, body: dict[str, Any]) -> httpx.Response:
        answer = server.http.post(path, json={"model": "demo", **body})
        assert answer.status_code == 200, answer.text
        return answer


def assert_numbered(events: list[dict[str, Any]]) -> None:
    numbers = [event["sequence_number"] for event in events if "sequence_number" in event]
    assert numbers == list(range(len(numbers)))


@pytest.fixture(scope="module")
def servers(server: Server, stock: Server, manifest: Manifest) -> Servers:
    return Servers(server, stock, manifest)


PLAINLY = [*BOTH, *PLAIN, *DECLINED]
STREAMING = [*BOTH, *STREAMED, *DECLINED]


@pytest.fixture(scope="module")
def pairs(servers: Servers) -> dict[tuple[int, bool], Future[Pair]]:
    """Asks everything at once; returns both servers' answers by the case's identity and stream."""
    cases = [(case, False) for case in PLAINLY] + [(case, True) for case in STREAMING]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        return {
            (id(case), stream): threads.submit(servers.both, case, stream=stream)
            for case, stream in cases
        }


@pytest.mark.parametrize("case", PLAINLY, ids=str)
def test_plain_answer_is_stocks(pairs: dict[tuple[int, bool], Future[Pair]], case: Case) -> None:
    assert_same(*pairs[id(case), False].result())


@pytest.mark.parametrize("case", STREAMING, ids=str)
def test_streamed_answer_is_stocks(pairs: dict[tuple[int, bool], Future[Pair]], case: Case) -> None:
    assert_same(*pairs[id(case), True].result())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        chat(text=REFUSED, max_tokens=40),
        response(REFUSED, max_output_tokens=40),
        message(REFUSED, max_tokens=40),
    ],
    ids=str,
)
def test_refusal_is_the_same_where_a_parser_takes_it_for_a_thought(
    servers: Servers, case: Case, stream: bool
) -> None:
    plain = servers.ours(case, stream=stream)
    thought = servers.ours(
        Case(case.path, {**case.body, "chat_template_kwargs": THINKING}), stream=stream
    )
    assert "refus" in json.dumps(plain)
    for told in (*plain, *thought):  # vLLM counts the thoughts of a refusal, and is right
        told.pop("usage", None)
        told.get("response", told).pop("usage", None)
    assert_same(thought, plain)
