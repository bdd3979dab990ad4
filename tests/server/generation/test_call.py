"""What a call checks, and what it tells the HTTP layer; tests/e2e has the real engine."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from models.errors import RequestError
from server.context import DecisionContext
from server.generation.call import decision_of
from server.generation.seam import Call
from server.web.errors import failure
from tests.server.contexts import AS_TRAINED
from tests.server.generation.enginefake import (
    MARK,
    OPENING,
    PROMPT,
    TEXT,
    FakeEngine,
    called,
    collected,
    parameters,
    streamed,
)


def test_marks_never_reach_the_engine() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [MARK, 1, MARK, MARK, 2, *OPENING]}
    context = DecisionContext(AS_TRAINED, opens_turn=True, marked=True)
    collected(called(engine, context), prompt)
    assert engine.calls[0][0] == [1, 2, *OPENING]


def test_mark_that_the_guard_did_not_set_is_no_token() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [1, MARK, 2]}
    with pytest.raises(RequestError, match=f"the id {MARK}, which is no token"):
        collected(called(engine, DecisionContext(AS_TRAINED)), prompt)
    assert engine.calls == []


def test_conversation_has_to_end_where_the_decision_begins() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [1, *OPENING, 2]}
    with pytest.raises(RequestError, match="does not end where"):
        collected(called(engine, DecisionContext(AS_TRAINED, opens_turn=True)), prompt)
    assert engine.calls == []
    collected(called(engine, DecisionContext(AS_TRAINED)), prompt)
    assert len(engine.calls) == 1


def test_too_long_prompt_reaches_no_engine() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [1] * 15}
    with pytest.raises(RequestError, match="may have 14"):
        collected(called(engine, DecisionContext(AS_TRAINED)), prompt)
    with pytest.raises(RequestError, match="may have 14"):
        asyncio.run(decision_of(called(engine, DecisionContext(AS_TRAINED)), prompt))
    second = Call(engine, DecisionContext(AS_TRAINED), 1, parameters(), "id", {})
    with pytest.raises(RequestError, match="may have 14"):
        collected(second, prompt)
    assert engine.calls == []


def test_log_probabilities_of_all_prompts_are_bounded_together() -> None:
    engine = FakeEngine()
    context = DecisionContext(
        AS_TRAINED, history=(0, 0), logprobs=2 * 3 * 4 + 2 * len(PROMPT["prompt_token_ids"])
    )
    params = parameters(n=2, max_tokens=4, logprobs=2, prompt_logprobs=0)
    assert collected(called(engine, context, params)) == [[TEXT], [TEXT]]
    assert context.logprobs == 0
    with pytest.raises(RequestError, match=r"1 log-probabilities more .*RHEOSTAT_MAX_LOGPROBS"):
        collected(called(engine, context, parameters(logprobs=0, max_tokens=1)))
    assert len(engine.calls) == 1


def test_answer_whose_length_nobody_names_holds_the_log_probabilities_that_fit() -> None:
    engine = FakeEngine()
    context = DecisionContext(AS_TRAINED, logprobs=2 * 3 * 4 + 5, names_length=False)
    params = parameters(n=2, max_tokens=400, logprobs=2)
    collected(called(engine, context, params))
    ((_, sent, _),) = engine.calls
    assert sent.max_tokens == 4 + 1  # the decision takes a step


def test_step_of_a_stream_holds_so_many_log_probabilities_of_all_prompts() -> None:
    fits = {"n": 2, "logprobs": 4, "stream_interval": 3}
    context = DecisionContext(AS_TRAINED, history=(0, 0), piece_logprobs=60, prompts=2)
    engine = FakeEngine()
    collected(called(engine, context, streamed(**fits)))
    assert len(engine.calls) == 1
    with pytest.raises(RequestError, match=r"hold 72 .*at most 60 .*RHEOSTAT_MAX_LOGPROBS") as e:
        collected(called(engine, context, streamed(**{**fits, "logprobs": 5})))
    assert (e.value.status, e.value.param) == (422, "logprobs")
    collected(called(engine, context, parameters(**{**fits, "logprobs": 5})))


def test_call_tells_the_http_layer_that_it_began_or_why_it_was_rejected() -> None:
    context = DecisionContext(AS_TRAINED, opens_turn=True)
    collected(called(FakeEngine(), context), {**PROMPT, "prompt_token_ids": OPENING})
    assert (context.started, context.failure) == (True, None)
    context = DecisionContext(AS_TRAINED)
    with pytest.raises(RequestError):
        collected(called(FakeEngine(), context), {"type": "token", "prompt_token_ids": [1] * 15})
    assert context.failure is not None
    assert context.failure[2:] == ("messages", "context_length_exceeded")
    assert context.started is False


def test_what_vllm_raises_is_told_to_the_http_layer_too() -> None:
    class Rejecting(FakeEngine):
        async def generate_stock(self, *_: Any, **options: Any) -> AsyncGenerator[Any, None]:
            raise ValueError("vLLM's")
            yield

    context = DecisionContext(AS_TRAINED)
    with pytest.raises(ValueError, match="vLLM's"):
        collected(called(Rejecting(), context))
    assert context.failure == failure(500, "vLLM's")
