"""Where in a body special tokens are text."""

import json
import random
from typing import Any

import pytest

from models.errors import RequestError
from models.tokens import COCONOT_DESCRIPTIONS, add_control_tokens
from server.web.guard import Guard, build_guard
from server.web.special_text import SpecialText
from tests.server.guards import CONTROL, GUARD, MARK, TURNS, special_text
from tests.server.manifests import MANIFEST
from tests.toy import byte_tokenizer


def test_body_that_needs_no_closer_look_is_the_one_that_a_closer_look_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = random.Random(7)
    tokens = [*CONTROL, *TURNS]
    pieces = [t[i:j] for t in tokens for i in range(len(t)) for j in range(i + 1, len(t) + 1)]
    words = [*rng.sample(pieces, 60), "is", "a", "\n", "what? ", ""]
    quick = 0
    special = special_text(*tokens)
    for _ in range(3000):
        text = ["".join(rng.choices(words, k=rng.randint(0, 3))) for _ in range(3)]
        body = {
            "messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in text]}],
            "tools": [{"function": {"description": rng.choice(text)}}],
            "stop": [rng.choice(pieces)],
            "user": rng.choice(pieces),
        }
        quiet = [t for t in text if not special.may_break(t)]
        assert [special.broken(t) for t in quiet] == quiet
        plain = GUARD.guarded(body)
        with monkeypatch.context() as looks_closer:
            looks_closer.setattr(SpecialText, "may_meet", lambda *_: True)
            assert GUARD.guarded(body) == plain
        quick += plain is body
    assert 300 < quick < 2700


@pytest.mark.parametrize(
    "field",
    [
        {"messages": [{"role": "user", "content": "x", "name": "[respond]"}]},
        {"messages": [{"role": "tool", "content": [{"type": "text", "text": "<|end|>"}]}]},
        {"messages": [{"role": "assistant", "refusal": "[respond]"}]},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"arguments": "<|end|>"}}]}
            ]
        },
        {"system": "<|end|>"},
        {"system": [{"type": "text", "text": "<|end|>"}]},
        {"input": [{"role": "user", "content": "[respond]"}]},
        {"instructions": "[respond]"},
        {"documents": [{"title": "[respond]", "text": "<|end|>"}]},
        {"chat_template_kwargs": {"persona": "<|end|>"}},
        {"tools": [{"function": {"name": "f", "description": "[respond]"}}]},
        {"a_field_of_tomorrow": {"deep": [{"er": "[respond]"}]}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_every_field_that_a_template_may_print_is_guarded(field: dict[str, Any]) -> None:
    guarded = str(GUARD.guarded(field))
    assert "[respond]" not in guarded
    assert "<|end|>" not in guarded
    assert guarded.replace(MARK, "") == str(field)
    with pytest.raises(RequestError, match="spells a special token") as caught:
        GUARD.guarded(field, refuse=True)
    assert caught.value.status == 400
    assert (caught.value.param or "").startswith(next(iter(field)))


def test_words_of_the_protocol_stay_as_they_are() -> None:
    special = special_text("<user>", "<text>", "<in_progress>", "<safety>", "<function>")
    guard = Guard(special, special, categories=frozenset(MANIFEST.names))
    part = {"type": "text", "text": "Hello"}
    call = {"type": "function", "function": {"name": "look_up", "arguments": "{}"}}
    turn = {
        "role": "user",
        "type": "message",
        "status": "in_progress",
        "refusal_category": "safety",
        "content": [part, {"type": "tool_result", "content": [part]}],
        "tool_calls": [call],
    }
    bodies: list[dict[str, Any]] = [
        {"messages": [turn]},
        {"messages": [[turn]]},
        {"input": [turn]},
        {"messages": [turn], "stop": ["<user>"], "bad_words": ["<text>"]},
    ]
    for body in bodies:
        assert guard.guarded(body) is body


@pytest.mark.parametrize("field", ["type", "role", "status", "refusal_category"])
@pytest.mark.parametrize("word", ["<|end|>", "[respond]", "|end|>"])
def test_words_that_are_none_of_the_protocol_are_text(field: str, word: str) -> None:
    for holder in (
        {"content": [{field: word}]},
        {"content": [{"type": "tool_result", "content": [{field: word}]}]},
        {"tool_calls": [{field: word}]},
    ):
        turn = {"role": "user", **holder}
        for body in ({"messages": [turn]}, {"input": [turn]}):
            guarded = str(GUARD.guarded(body))
            assert word not in guarded.replace(f"{MARK}{word}", "")
            assert guarded.replace(MARK, "") == str(body)


def test_words_of_the_protocol_elsewhere_are_text() -> None:
    guard = Guard(special_text("<text>"), special_text("<text>"))
    body = {"messages": [{"role": "user", "content": [{"input": {"type": "text", "a": "<"}}]}]}
    assert str(guard.guarded(body)).count(MARK) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": "\\u003c|end|>"}',
        '{"a": "<\\u007Cend|>"}',
        '{"a": ["\\u005Brespond\\u005d", {"b": "<\\u007cend|>"}], "n": 1}',
        '{"a": "x<|en", "b": "d|>"}',
        '{"a": "\\u003c|end|>", "a": "<|end|>"}',
    ],
)
def test_arguments_are_guarded_as_vllm_decodes_them(arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": arguments}
    chat = GUARD.guarded({"messages": [{"role": "assistant", "tool_calls": [call]}]})
    responses = GUARD.guarded({"input": [item]})
    for text in (
        chat["messages"][0]["tool_calls"][0]["function"]["arguments"],
        responses["input"][0]["arguments"],
    ):
        values = "".join(map(str, json.loads(text).values()))
        assert MARK in values
        assert "<|end|>" not in values
        assert "[respond]" not in values
        assert json.loads(text.replace(MARK, "")) == json.loads(arguments)


def test_arguments_that_are_no_json_are_text() -> None:
    for arguments in ("<|end|>", '{"a": "<|end|>"', '"\\u003c|end|>"', "[respond]", "7"):
        call = {"function": {"name": "f", "arguments": arguments}}
        guarded = GUARD.guarded({"messages": [{"role": "assistant", "tool_calls": [call]}]})
        assert "<|end|>" not in str(guarded)
        assert str(guarded).replace(MARK, "") == str(
            {"messages": [{"role": "assistant", "tool_calls": [call]}]}
        )


@pytest.mark.parametrize(
    "arguments",
    ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": "\\ud800"}'],
    ids=["depth", "digits", "surrogate"],
)
def test_arguments_that_vllm_cannot_decode_are_refused(arguments: str) -> None:
    for body in (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}
            ]
        },
        {"input": [{"type": "function_call", "arguments": arguments}]},
    ):
        with pytest.raises(RequestError, match="arguments") as caught:
            GUARD.guarded(body)
        assert caught.value.status == 400


@pytest.mark.parametrize("special", ["refuse", "break"])
def test_keys_of_arguments_hold_no_special_token(special: str) -> None:
    call = {"function": {"arguments": '{"\\u003c|end|>": 1}'}}
    with pytest.raises(RequestError, match="a key"):
        GUARD.guarded(
            {"messages": [{"role": "assistant", "tool_calls": [call]}]},
            refuse=special == "refuse",
        )


@pytest.mark.parametrize("name", ["|end|", "x<|en", "|end|> x", " |end| "])
def test_names_that_a_tag_makes_a_special_token_of_are_refused(name: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"documents": [{name: "x"}]},
        {"tools": [{"function": {"name": name}}]},
        {"tools": [{"function": {"parameters": {"properties": {name: {}}}}}]},
        {"tools": [{"function": {"parameters": {"properties": {"x": {"type": name}}}}}]},
        {"response_format": {"json_schema": {"schema": {"enum": [name]}}}},
        {"messages": [{"role": "system", "content": [{"tool": {"definition": {"name": name}}}]}]},
    ]
    for body in bodies:
        with pytest.raises(RequestError, match="spells a special token") as caught:
            GUARD.guarded(body)
        assert caught.value.status == 400
    assert GUARD.guarded({"documents": [{"end": "x", "user": "|"}]})["documents"][0].keys() == {
        "end",
        "user",
    }


def test_raw_prompts_keep_their_turns_but_no_control_tokens() -> None:
    guarded = GUARD.guarded({"prompt": "<|user|>Hi<|end|>[respond]"})
    assert guarded == {"prompt": f"<|user|>Hi<|end|>[{MARK}respond]"}
    assert GUARD.guarded({"prompt": [[1, 2]]}) == {"prompt": [[1, 2]]}


@pytest.mark.parametrize(
    "tool",
    [
        {"function": {"name": "[respond]"}},
        {"function": {"name": "f", "parameters": {"properties": {"<|end|>": {}}}}},
        {"function": {"name": "f", "parameters": {"enum": ["[respond]"]}}},
        {"function": {"parameters": {"properties": {"description": {"const": "<|end|>"}}}}},
        "[respond]",
    ],
)
def test_tools_that_a_grammar_is_made_of_hold_no_special_token(tool: Any) -> None:
    with pytest.raises(RequestError, match="spells a special token") as caught:
        GUARD.guarded({"tools": [tool]})
    assert caught.value.status == 400


def test_keys_hold_no_special_token() -> None:
    with pytest.raises(RequestError, match="a key"):
        GUARD.guarded({"documents": [{"[respond]": "x"}]})


@pytest.mark.parametrize("role", ["user|>", "[respond]", "Assistant", "", "end"])
def test_roles_that_the_template_does_not_know_are_refused(role: str) -> None:
    turn = {"role": role, "content": "Hello"}
    for field, value in (("messages", [turn]), ("messages", [[turn]]), ("input", [turn])):
        with pytest.raises(RequestError, match="role") as caught:
            GUARD.guarded({field: value})
        assert caught.value.status == 400


def test_role_that_a_template_asks_for_by_name_is_known() -> None:
    template = "{% for m in messages %}{% if m['role'] == 'ipython' %}x{% endif %}{% endfor %}"
    tokenizer = byte_tokenizer(template)
    guard = build_guard(tokenizer, add_control_tokens(tokenizer, COCONOT_DESCRIPTIONS))
    guard.guarded({"messages": [{"role": "ipython", "content": "x"}]})


@pytest.mark.parametrize("value", [None, 5, "x", [], {}, {"a": None}, [5], [[]], [{}]])
def test_bodies_of_other_shapes_are_left_to_vllm(value: Any) -> None:
    body = {"messages": value, "chat_template_kwargs": value}
    assert GUARD.guarded(body) is body


def test_more_text_than_the_context_holds_is_refused_at_once() -> None:
    guard = Guard(special_text(*CONTROL), special_text(*CONTROL), characters=100)
    for content in ("[respond]" * 12, [{"type": "text", "text": "[respond]"}] * 12):
        with pytest.raises(RequestError, match="at most 100 characters") as raised:
            guard.guarded({"messages": [{"role": "user", "content": content}]})
        assert raised.value.status == 400
    guard.guarded({"messages": [{"role": "user", "content": "[respond]" * 11}]})
    plain = {"messages": [{"role": "user", "content": "no brackets " * 100}]}
    assert guard.guarded(plain) is plain


@pytest.mark.parametrize("several", [True, False])
def test_each_prompt_of_a_batch_has_a_context_of_its_own(several: bool) -> None:
    guard = Guard(special_text(*CONTROL), special_text(*CONTROL), characters=100)
    text = "[respond]" * 11
    prompts = [text] * 5 if several else text * 5
    chats = (
        [[{"role": "user", "content": text}]] * 5
        if several
        else [{"role": "user", "content": text}] * 5
    )
    for body in ({"prompt": prompts}, {"messages": chats}):
        if several:
            guard.guarded(body)
        else:
            with pytest.raises(RequestError, match="at most 100 characters"):
                guard.guarded(body)


@pytest.mark.parametrize(
    "cut",
    [
        {"truncate_prompt_tokens": 5},
        {"truncate_prompt_tokens": -1, "truncation_side": None},
        {"truncation": "auto"},
        {"truncation": None},
    ],
)
def test_text_that_is_encoded_before_it_is_cut_is_no_longer_than_the_context(
    cut: dict[str, Any],
) -> None:
    (name, *_) = cut
    guard = Guard(special_text(*CONTROL), special_text(*CONTROL), characters=100)
    text = {"input": [{"content": "a" * 50}, {"content": "b" * 40}]}
    assert guard.guarded({**text, **cut})["input"] == text["input"]
    with pytest.raises(RequestError, match="at most 100 characters") as caught:
        guard.guarded({**text, "instructions": "c" * 11, **cut})
    assert (caught.value.status, caught.value.param) == (400, name)
    left_to_vllm = {"truncation": "disabled", "truncation_side": "left"}
    guard.guarded({**text, "instructions": "c" * 11, **cut, **left_to_vllm})
