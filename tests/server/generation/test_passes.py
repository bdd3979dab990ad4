"""The passes that an answer takes, on a fake engine; tests/e2e has the real one."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from models.controls import EXTRA_ARGS_KEY
from models.errors import RequestError
from server.context import Decision, DecisionContext
from server.generation.call import outputs_of
from server.generation.seam import Call
from tests.server.contexts import AS_TRAINED
from tests.server.generation.enginefake import (
    OPENING,
    PROMPT,
    SAFETY,
    TEXT,
    FakeEngine,
    called,
    collected,
    parameters,
)


def test_one_pass_decides_and_hides_its_token() -> None:
    engine = FakeEngine()
    context = DecisionContext(AS_TRAINED)
    assert collected(called(engine, context)) == [[TEXT]]
    assert context.decisions == {(0, 0): Decision(0)}
    ((ids, params, request_id),) = engine.calls
    assert (ids, request_id) == (PROMPT["prompt_token_ids"], "id")
    assert params.max_tokens == 6
    assert params.extra_args[EXTRA_ARGS_KEY] == AS_TRAINED.controls.to_wire()


@pytest.mark.parametrize(
    ("seed", "temperature", "passes"), [(7, 1.0, 2), (7, 0.0, 1), (None, 1.0, 1)]
)
def test_draws_of_a_seed_begin_with_the_first_token_of_the_answer(
    seed: int | None, temperature: float, passes: int
) -> None:
    engine = FakeEngine()
    collected(
        called(engine, DecisionContext(AS_TRAINED), parameters(seed=seed, temperature=temperature))
    )
    assert len(engine.calls) == passes


@pytest.mark.parametrize(
    "field",
    [
        {"repetition_penalty": 1.1},
        {"skip_special_tokens": False},
        {"skip_special_tokens": None},
    ],
)
@pytest.mark.parametrize("v2", [False, True])
def test_decision_comes_first_where_a_field_reaches_its_logits(
    field: dict[str, Any], v2: bool
) -> None:
    engine = FakeEngine(v2=v2)
    context = DecisionContext(AS_TRAINED, report=True)
    assert collected(called(engine, context, parameters(**field))) == [[TEXT]]
    assert context.decisions == {(0, 0): Decision(0, (1.0, -1.0), 2.0)}
    (_, decision, name), (continued, answer, _) = engine.calls
    assert name == "id-decision"
    assert decision.logprob_token_ids is None
    assert continued == [1, 2, *OPENING, SAFETY]
    assert answer.extra_args is None


def texts(call: Call) -> list[tuple[Any, ...]]:
    async def collect() -> list[tuple[Any, ...]]:
        return [
            (choice.text, list(choice.token_ids), choice.finish_reason, choice.stop_reason)
            async for output in outputs_of(call, PROMPT)
            for choice in output.outputs
        ]

    return asyncio.run(collect())


@pytest.mark.parametrize("field", [{}, {"min_tokens": 2}, {"repetition_penalty": 1.1}])
@pytest.mark.parametrize("choices", [1, 3])
def test_refusal_with_a_fixed_text_ends_at_the_decision(
    field: dict[str, Any], choices: int
) -> None:
    engine = FakeEngine()
    context = DecisionContext(AS_TRAINED, texts=("Ask the desk.", None))
    ended = texts(called(engine, context, parameters(n=choices, **field)))
    assert ended == [("Ask the desk.", [], "stop", None)] * choices
    assert len(engine.calls) == 1
    assert context.refusal_texts == {(0, i): "Ask the desk." for i in range(choices)}


@pytest.mark.parametrize("field", [{}, {"min_tokens": 2}])
def test_fixed_text_of_another_category_and_answers_go_on(field: dict[str, Any]) -> None:
    other = DecisionContext(AS_TRAINED, texts=(None, "Ask the desk."))
    assert texts(called(FakeEngine(), other, parameters(**field)))[0][1] == [TEXT]
    own = DecisionContext(AS_TRAINED, texts=("Ask the desk.", None))
    answering = FakeEngine(answers=True)
    assert texts(called(answering, own, parameters(**field)))[0][1] == [TEXT]


def test_grammar_that_no_text_follows_is_the_requests_fault() -> None:
    engine = FakeEngine(answers=True, ends_with="error")
    params = parameters(structured_outputs=SimpleNamespace())
    with pytest.raises(RequestError, match="no text follows the grammar") as raised:
        collected(called(engine, DecisionContext(AS_TRAINED), params))
    assert raised.value.status == 400
    other = parameters(bad_words=["x"])  # in two passes too, and ended by the engine's own fault
    assert collected(called(engine, DecisionContext(AS_TRAINED), other)) == [[TEXT]]
    refusing = FakeEngine(ends_with="error")  # its text follows no grammar
    assert collected(called(refusing, DecisionContext(AS_TRAINED), params)) == [[TEXT]]


SHAPED: list[dict[str, Any]] = [
    {"logit_bias": {7: 100.0}},
    {"allowed_token_ids": [7]},
    {"bad_words": ["sorry"], "_bad_words_token_ids": [[7]]},
    {"min_tokens": 3},
    {"ignore_eos": True},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"repetition_penalty": 2.0},
]


@pytest.mark.parametrize("shaped", SHAPED, ids=str)
@pytest.mark.parametrize("has_floor", [False, True])
def test_text_of_a_refusal_is_the_models_own_under_a_floor(
    shaped: dict[str, Any], has_floor: bool
) -> None:
    name = next(iter(shaped))
    for answers in (False, True):
        engine = FakeEngine(answers=answers)
        context = DecisionContext(AS_TRAINED, has_floor=has_floor)
        collected(called(engine, context, parameters(**shaped)))
        _, sent, _ = engine.calls[-1]
        own = parameters(repetition_penalty=engine.repetition_penalty)
        kept = own if has_floor and not answers else parameters(**shaped)
        if name == "min_tokens" and not has_floor:
            kept.min_tokens += 1  # one pass, which has a token more
        assert getattr(sent, name) == getattr(kept, name)


def test_beams_have_no_fixed_texts() -> None:
    context = DecisionContext(AS_TRAINED, beam_search=True, texts=("Ask the desk.", None))
    with pytest.raises(RequestError, match="use_beam_search"):
        collected(called(FakeEngine(), context))


def test_decision_that_never_came_is_an_error() -> None:
    engine = FakeEngine(silent=True)
    with pytest.raises(RequestError, match="aborted"):
        collected(called(engine, DecisionContext(AS_TRAINED), parameters(repetition_penalty=1.1)))


@pytest.mark.parametrize("has_floor", [False, True])
@pytest.mark.parametrize("texts", [(), ("Ask the desk.", None)])
@pytest.mark.parametrize("answers", [False, True])
def test_parameters_that_a_refusal_drops_are_validated(
    texts: tuple[str | None, ...], has_floor: bool, answers: bool
) -> None:
    context = DecisionContext(AS_TRAINED, has_floor=has_floor, texts=texts)
    engine = FakeEngine(answers=answers)
    with pytest.raises(ValueError, match="out of the vocabulary"):
        collected(called(engine, context, parameters(allowed_token_ids=[99])))
    assert context.failure is not None
    assert context.refusal_texts == {}
