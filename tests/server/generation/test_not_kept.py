"""Checkpoints whose control token does not stay in the context, on a fake engine."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from models.errors import RequestError
from server.context import Decision, DecisionContext
from server.generation.call import decision_of, outputs_of
from server.generation.outputs import begin_with
from server.generation.seam import Call
from tests.server.contexts import AS_TRAINED
from tests.server.generation.enginefake import (
    HUMANIZING,
    OPENING,
    PROMPT,
    RESPOND,
    SAFETY,
    TEXT,
    FakeEngine,
    called,
    collected,
    parameters,
    streamed,
)
from tests.server.manifests import MANIFEST

# Two earlier turns as the server opens them, and without their control tokens.
TURNS = [1, *OPENING, RESPOND, 5, 1, *OPENING, HUMANIZING, 6, 2, *OPENING]
BARE = [1, *OPENING, 5, 1, *OPENING, 6, 2, *OPENING]


def _engine(**options: Any) -> FakeEngine:
    engine = FakeEngine(**options)
    engine.manifest = MANIFEST.model_copy(update={"kept": False})
    return engine


def _prompt(ids: list[int]) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": ids}


def _context(**fields: Any) -> DecisionContext:
    return DecisionContext(AS_TRAINED, **{"opens_turn": True, **fields})


def test_answer_goes_on_from_the_prompt_alone_with_the_parameters_of_the_client() -> None:
    engine = _engine(answers=True)
    params = parameters(max_tokens=5, min_tokens=2)
    assert collected(called(engine, _context(), params)) == [[TEXT]]
    decision, answer = engine.calls
    assert decision[0] == answer[0] == PROMPT["prompt_token_ids"]
    assert decision[2] == "id-decision"
    assert (answer[1].max_tokens, answer[1].min_tokens, answer[1].stop_token_ids) == (5, 2, None)
    assert answer[1].extra_args is None


def test_refusal_is_the_text_of_the_policy_or_of_the_category() -> None:
    for texts, said in (
        ((), MANIFEST.categories[0].refusal_text),
        (("Not here.", None), "Not here."),
    ):
        engine, context = _engine(), _context(texts=texts)
        call = called(engine, context)

        async def collect(call: Any = call) -> list[tuple[str, list[int]]]:
            return [
                (choice.text, list(choice.token_ids))
                async for output in outputs_of(call, PROMPT)
                for choice in output.outputs
            ]

        assert asyncio.run(collect()) == [(said, [])]
        assert len(engine.calls) == 1
        assert context.decisions == {(0, 0): Decision(0)}


def test_neither_decision_nor_answer_sees_the_tokens_of_earlier_turns() -> None:
    engine = _engine(answers=True)
    collected(called(engine, _context(history=(2,))), _prompt(TURNS))
    assert [ids for ids, _, _ in engine.calls] == [BARE, BARE]
    alone = _engine(answers=True)
    asyncio.run(decision_of(called(alone, _context(history=(2,))), _prompt(TURNS)))
    assert [ids for ids, _, _ in alone.calls] == [BARE]


def test_continued_turn_is_decided_before_its_text() -> None:
    ids = [1, *OPENING, RESPOND, 5, 2, *OPENING, RESPOND, 8, 9]
    engine = _engine(answers=True)
    collected(called(engine, _context(history=(2,), continues=True)), _prompt(ids))
    decided = [1, *OPENING, 5, 2, *OPENING]
    assert [ids for ids, _, _ in engine.calls] == [decided, [*decided, 8, 9]]


@pytest.mark.parametrize(
    ("ids", "written", "continues"),
    [
        # A control token of the client's, in a conversation and in a raw prompt.
        ([1, *OPENING, RESPOND, 5, RESPOND, 2, *OPENING], 1, False),
        ([1, SAFETY, *OPENING], 0, False),
        # A turn that was cut off, dropped or printed twice.
        (TURNS[4:], 2, False),
        (BARE, 2, False),
        ([*TURNS[:5], *TURNS], 2, False),
        # One that stands elsewhere than where a turn begins.
        ([1, 5, RESPOND, 6, 2, *OPENING], 1, False),
        # The prompt ends before or behind the decision step.
        ([1, *OPENING, RESPOND, 5], 1, False),
        # The continued turn's own token is gone: an earlier turn would be decided.
        ([1, *OPENING, RESPOND, 5, 2, *OPENING, 8, 9], 2, True),
    ],
)
def test_prompt_is_held_to_the_tokens_that_the_server_wrote(
    ids: list[int], written: int, continues: bool
) -> None:
    engine = _engine(answers=True)
    context = _context(history=(written,), continues=continues)
    with pytest.raises(RequestError):
        collected(called(engine, context), _prompt(ids))
    assert engine.calls == []


def test_beams_would_follow_no_token() -> None:
    with pytest.raises(RequestError, match="use_beam_search: refusals have fixed texts"):
        collected(called(_engine(), _context(beam_search=True)))


def _with_prefix(**options: Any) -> FakeEngine:
    engine = _engine(**options)
    first, *others = engine.manifest.categories
    prefixed = first.model_copy(update={"refusal_prefix": "Sorry, I"})
    engine.manifest = engine.manifest.model_copy(update={"categories": (prefixed, *others)})
    return engine


def _texts(call: Call) -> list[str]:
    async def collect() -> list[str]:
        return [o.outputs[0].text async for o in outputs_of(call, PROMPT)]

    return asyncio.run(collect())


@pytest.mark.parametrize("params", [parameters(), streamed()])
def test_refusal_goes_on_from_the_prefix_that_the_manifest_holds(params: Any) -> None:
    engine = _with_prefix()
    context = _context()
    assert _texts(called(engine, context, params)) == ["Sorry, INo."]
    assert context.refusal_texts == {(0, 0): "Sorry, INo."}
    _, (ids, sent, _) = engine.calls
    assert ids == [*PROMPT["prompt_token_ids"], *engine.text_ids("Sorry, I")]
    assert sent.extra_args is None


def test_prefix_is_for_generated_refusals_only() -> None:
    policys = _context(texts=("Not here.", None))
    assert _texts(called(_with_prefix(), policys)) == ["Not here."]
    answering = _with_prefix(answers=True)
    assert _texts(called(answering, _context())) == ["No."]
    assert answering.calls[-1][0] == PROMPT["prompt_token_ids"]


def test_refusal_is_the_category_s_text_where_no_place_is_left_for_the_prefix() -> None:
    engine = _with_prefix()
    engine.model_config.max_model_len = len(PROMPT["prompt_token_ids"]) + 2
    assert _texts(called(engine, _context())) == [MANIFEST.categories[0].refusal_text]


def test_prefix_of_a_stream_comes_once() -> None:
    async def pieces() -> AsyncGenerator[Any, None]:
        for text in ("a", "b"):
            yield SimpleNamespace(outputs=[SimpleNamespace(text=text)])

    async def texts(*, streamed: bool) -> list[str]:
        stream: Any = begin_with("x", pieces(), streamed=streamed)
        return [output.outputs[0].text async for output in stream]

    assert asyncio.run(texts(streamed=True)) == ["xa", "b"]
    assert asyncio.run(texts(streamed=False)) == ["xa", "xb"]
