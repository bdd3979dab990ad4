"""The worst bodies that fit the server's bounds, and those that just do not."""

import json
from typing import Any, NamedTuple

MOST_BYTES = 4 * 2**20
MOST_STRINGS = 2**14
MOST_VALUES = 2**17
MOST_MESSAGES = 1024

CHAT = "/v1/chat/completions"
BATCH = "/v1/chat/completions/batch"
TEXT = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
SCORE = "/v1/refusal/score"
INVOCATIONS = "/invocations"
USER = {"role": "user", "content": "a"}
PART = {"type": "text", "text": "a"}
CALL = {"id": "a", "type": "function", "function": {"name": "b", "arguments": '{"c": 1}'}}
RESULT = {"type": "tool_result", "tool_use_id": "a", "content": [PART] * 500}


class Body(NamedTuple):
    """One request: what is in its body, where it goes and the bytes."""

    name: str
    path: str
    raw: bytes


def worst_bodies() -> list[Body]:
    """Returns them, those that are too large first."""
    return [*_too_large(), *_chats(), *_prompts(), *_items(), *_blocks(), *_scores()]


def _too_large() -> list[Body]:
    entries = {
        "numbers": b"1",
        "long numbers": b"1" * 100,
        "fractions": b"1.5e3",
        "words": b"null",
        "lists": b"[]",
        "objects": b"{}",
        "empty strings": b'""',
        "escapes": rb'"\\\\\""',
    }
    bodies = [Body(name, CHAT, _list_of(entry)) for name, entry in entries.items()]
    opened = (MOST_BYTES - 30) // 2
    bodies.append(Body("nesting", CHAT, b'{"a":' + b"[" * opened + b"]" * opened + b"}"))
    bodies.append(Body("open lists", CHAT, b'{"a":' + b"[" * 60_000))
    bodies.append(Body("one string", CHAT, b'{"a":"' + b"\\u0061" * 690_000 + b'"}'))
    bodies.append(Body("one number", CHAT, b'{"a":' + b"1" * 4_000_000 + b"}"))
    keys = b",".join(b'"%x":1' % key for key in range(380_000))
    bodies.append(Body("keys", CHAT, b"{" + keys + b"}"))
    bodies.append(Body("another encoding", CHAT, json.dumps("a" * 2_000_000).encode("utf-16")))
    return bodies


def _list_of(entry: bytes) -> bytes:
    count = (MOST_BYTES - 30) // (len(entry) + 1)
    return b'{"messages":[' + b",".join([entry] * count) + b"]}"


def _body(name: str, path: str, **fields: Any) -> Body:
    limit = {RESPONSES: "max_output_tokens"}.get(path, "max_tokens")
    bound = {} if path in (SCORE, COUNT) else {limit: 4}
    return Body(name, path, json.dumps({"model": "demo", **bound, **fields}).encode())


def _content(content: Any, count: int = 1) -> list[Any]:
    return [{"role": "user", "content": content}] * count


def _chats() -> list[Body]:
    names = {f"k{key}": 1 for key in range(MOST_STRINGS - 20)}
    some_names = {f"k{key}": 1 for key in range(MOST_STRINGS // 1024 - 5)}
    arguments = {"name": "b", "arguments": json.dumps([1] * (MOST_VALUES - 20))}
    decoding = {"role": "assistant", "tool_calls": [{**CALL, "function": arguments}]}
    conversations: dict[str, Any] = {
        "text": _content("some words " * 370_000),
        "tokens": _content("<|end|><|user|>[respond]" * 170_000),
        "broken tokens": _content("[[<" * 1_300_000),
        "no spaces": _content("a" * 4_000_000),
        "messages": [USER] * MOST_MESSAGES,
        "parts": _content([PART] * (MOST_MESSAGES - 1)),
        "odd parts": _content([{}] * (MOST_MESSAGES - 1)),
        "number parts": _content([1] * (MOST_MESSAGES - 1)),
        "string parts": _content(["a"] * (MOST_MESSAGES - 1)),
        "too many parts": _content([1] * (MOST_VALUES - 20)),
        "calls": [USER, {"role": "assistant", "tool_calls": [CALL] * 1000}, USER],
        "long arguments": [USER, decoding, USER],
        "wide message": [{**USER, **names}],
        "wide messages": [{**USER, **some_names}] * 1000,
    }
    return [
        *(_body(name, CHAT, messages=turns) for name, turns in conversations.items()),
        *(_body(name, CHAT, messages=[USER], **fields) for name, fields in _fields().items()),
        _body("batch", BATCH, messages=[[USER] * 15] * 60),
        _body("empty batch", BATCH, messages=[[{}] * 15] * 60),
        _body("invocations", INVOCATIONS, messages=_content([{}] * (MOST_MESSAGES - 1))),
    ]


def _fields() -> dict[str, dict[str, Any]]:
    names = {f"k{key}": 1 for key in range(MOST_STRINGS - 20)}
    ids = list(range(MOST_VALUES - 20))
    properties = {f"p{key}": {"type": "string"} for key in range(18)}
    parameters = {"type": "object", "properties": properties}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}] * 256
    logprobs = {"logprobs": True, "top_logprobs": 20}
    wide_tool = {"type": "function", "function": {"name": "f", "parameters": names}}
    return {
        "unknown names": {"metadata": names},
        "biases": {"logit_bias": {str(key): 1.0 for key in range(MOST_STRINGS - 20)}},
        "allowed ids": {"allowed_token_ids": ids},
        "stop ids": {"stop_token_ids": ids},
        "odd stop ids": {"stop_token_ids": ["a"] * (MOST_STRINGS - 20)},
        "stop strings": {"stop": ["a" * 1000 + str(number) for number in range(128)]},
        "bad words": {"bad_words": [f"some words {number} " * 60 for number in range(128)]},
        "many bad words": {"bad_words": ["a"] * (MOST_STRINGS - 20)},
        "arguments": {"vllm_xargs": {f"k{key}": [1] for key in range(MOST_STRINGS // 2 - 20)}},
        "variables": {"chat_template_kwargs": names},
        "documents": {"documents": [{"title": "a", "text": "b" * 4000}] * 1000},
        "tools": {"tools": tools},
        "wide tool": {"tools": [wide_tool]},
        "choices": {"n": 128, "max_tokens": 3, "ignore_eos": True, **logprobs},
        "long choices": {"max_tokens": 390, "ignore_eos": True, **logprobs},
        "too many log-probabilities": {"n": 9, "max_tokens": 100, **logprobs},
        **_repeated(),
        **_grammars(),
    }


def _repeated() -> dict[str, dict[str, Any]]:
    logprobs = {"logprobs": True, "top_logprobs": 20}
    beams = {"use_beam_search": True, "ignore_eos": True, **logprobs}
    words = [f"some words {number} " * 60 for number in range(128)]
    choice = {"choice": [f"choice {number}" for number in range(3000)]}
    return {
        "repeated bad words": {"n": 128, "bad_words": words},
        "fitting bad words": {"n": 128, "bad_words": [words[0][:900]]},
        "repeated choice": {"n": 128, "structured_outputs": choice},
        "repeated ids": {"n": 128, "allowed_token_ids": list(range(100_000))},
        "repeated prompt": {"n": 128, "prompt_logprobs": 20},
        "streamed choices": {"n": 128, "stream": True, **logprobs},
        "fitting streams": {"n": 48, "stream": True, "ignore_eos": True, **logprobs},
        "long pieces": {"n": 9, "stream": True, "stream_interval": 9, "max_tokens": 90, **logprobs},
        "long beams": {"n": 10, "max_tokens": 450, **beams},
        "fitting beams": {"n": 10, "max_tokens": 39, **beams},
    }


def _grammars() -> dict[str, dict[str, Any]]:
    array = {"type": "array", "items": {}}
    arrays = {f"p{key}": {**array, "maxItems": 1000} for key in range(900)}
    most = {
        "anyOf": [{"type": "array", "items": {"const": key}, "maxItems": 4} for key in range(1000)]
    }
    grammars: dict[str, dict[str, Any]] = {
        "endless array": {"json": {**array, "minItems": 2147483647}},
        "endless array in a string": {"json": json.dumps({**array, "minItems": 2147483647})},
        "endless array in Lark": {"grammar": 'start: %json {"minItems": 2147483647}'},
        "long array": {"json": {**array, "maxItems": 4096}},
        "many arrays": {"json": {"type": "object", "properties": arrays}},
        "many short arrays": {"json": most},
        "endless pattern": {"regex": "a{2147483647}"},
        "nested pattern": {"regex": "((a{1000}){1000}){1000}"},
        "long pattern": {"regex": "(a{64}){64}"},
    }
    return {name: {"structured_outputs": grammar} for name, grammar in grammars.items()}


def _prompts() -> list[Body]:
    return [
        _body("ids", TEXT, prompt=[300] * (MOST_VALUES - 20)),
        _body("mixed ids", TEXT, prompt=[*[300] * (MOST_VALUES - 20), "a"]),
        _body("fractions for ids", TEXT, prompt=[1.5] * (MOST_VALUES - 20)),
        _body("prompts of ids", TEXT, prompt=[[300] * 1000] * 128),
        _body("short prompts of ids", TEXT, prompt=[[300] * 500] * 128),
        _body("prompts", TEXT, prompt=["some words " * 2900] * 128),
        _body("one prompt", TEXT, prompt="some words " * 370_000),
        _body("cut prompt", TEXT, prompt="some words " * 370_000, truncate_prompt_tokens=5),
        _body("lists in a prompt", TEXT, prompt=[["a"] * 150] * 100),
        _body("log-probabilities", TEXT, prompt=["a " * 480], prompt_logprobs=16),
        _body("repeated arguments", TEXT, prompt=["a"] * 128, vllm_xargs={"a": [1] * 100_000}),
        _body("too many log-probabilities", TEXT, prompt=["a " * 480] * 99, prompt_logprobs=20),
    ]


def _items() -> list[Body]:
    item = {"type": "function_call", "name": "a", "call_id": "b", "arguments": "{}"}
    part = {"type": "input_text", "text": "a"}
    output = {"type": "output_text", "text": "a", "annotations": []}
    message = {"type": "message", "role": "assistant", "content": [output]}
    names = {f"k{key}": "a" for key in range(MOST_STRINGS // 2 - 20)}
    inputs: dict[str, Any] = {
        "items": [USER] * MOST_MESSAGES,
        "typed items": [{"type": "message", **USER}] * MOST_MESSAGES,
        "calls": [USER, *[item] * 1000, USER],
        "outputs": [USER, *[message] * 500, USER],
        "parts": _content([part] * (MOST_MESSAGES - 1)),
        "odd parts": _content([{}] * (MOST_MESSAGES - 1)),
        "number parts": _content([1] * (MOST_MESSAGES - 1)),
        "odd outputs": [{**message, "content": [1] * 1000}],
        "empty items": [{}] * MOST_MESSAGES,
        "numbers": [1] * MOST_MESSAGES,
        "wide item": [{**USER, **names}],
        "wide odd item": [{"type": "a", **names}],
        "text": "some words " * 370_000,
    }
    return [
        *(_body(name, RESPONSES, input=value) for name, value in inputs.items()),
        _body("metadata", RESPONSES, input="a", metadata=names),
        _body("include", RESPONSES, input="a", include=["a"] * (MOST_STRINGS - 20)),
        _body("empty tools", RESPONSES, input="a", tools=[{}] * 256),
        _body("instructions", RESPONSES, input="a", instructions="some words " * 370_000),
    ]


def _blocks() -> list[Body]:
    contents: dict[str, Any] = {
        "blocks": [PART] * (MOST_MESSAGES - 1),
        "odd blocks": [{}] * (MOST_MESSAGES - 1),
        "results": [RESULT, RESULT],
        "text": "some words " * 370_000,
    }
    bodies = [_body(name, MESSAGES, messages=_content(value)) for name, value in contents.items()]
    system = {"messages": [USER], "system": [PART] * MOST_MESSAGES}
    too_many = {"messages": [USER], "system": [PART] * 3900}
    return [
        *bodies,
        _body("system blocks", MESSAGES, **system),
        _body("too many system blocks", MESSAGES, **too_many),
        _body("counted text", COUNT, messages=_content("some words " * 370_000)),
    ]


def _scores() -> list[Body]:
    conversation = {"messages": [USER] * 3}
    return [
        _body("inputs", SCORE, inputs=[{"messages": [USER]}] * 1024),
        _body("long inputs", SCORE, inputs=[conversation] * 1024),
        _body("prompts", SCORE, inputs=[{"prompt": "a" * 4000}] * 1024),
        _body("odd inputs", SCORE, inputs=[{"a": 1}] * 15_000),
    ]
