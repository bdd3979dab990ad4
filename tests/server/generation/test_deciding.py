"""Margins, shadows and records of decisions, on a fake engine; tests/e2e has the real one."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.errors import RequestError, ServiceError
from models.histogram import load_margins
from server.context import Decision, DecisionContext
from server.dials.board import Resolution
from server.generation.call import decision_of
from server.generation.margins import ROWS
from server.telemetry.recorder import MarginRecorder
from tests.server.contexts import AS_TRAINED
from tests.server.generation.enginefake import (
    PROMPT,
    TEXT,
    FakeEngine,
    called,
    collected,
    parameters,
)
from tests.server.manifests import MANIFEST


@pytest.fixture
def recorder(tmp_path: Path) -> MarginRecorder:
    return MarginRecorder(tmp_path / "margins.json", 1.0, MANIFEST.names, "a" * 64)


def rows(recorder: MarginRecorder, tmp_path: Path) -> int:
    recorder.flush()
    policies = load_margins(tmp_path / "margins.json").policies
    return policies["default"].rows if policies else 0


def test_report_reads_what_the_worker_wrote_in_the_one_pass() -> None:
    engine = FakeEngine()
    context = DecisionContext(AS_TRAINED, report=True)
    assert collected(called(engine, context)) == [[TEXT]]
    assert context.decisions == {(0, 0): Decision(0, (1.0, -1.0), 2.0)}
    assert [request_id for _, _, request_id in engine.calls] == ["id"]
    assert_all_rows_are_free(engine)


def assert_all_rows_are_free(engine: FakeEngine) -> None:
    async def take_all() -> None:
        for _ in range(ROWS):
            await engine.margin_board.take()

    asyncio.run(asyncio.wait_for(take_all(), timeout=30))


def test_engine_that_opens_an_answer_with_no_control_token_is_not_believed() -> None:
    engine = FakeEngine()
    engine.opens_with = TEXT
    context = DecisionContext(AS_TRAINED)
    with pytest.raises(ServiceError, match="is it steered"):
        collected(called(engine, context))
    assert context.failure is not None
    assert context.failure.status == 500
    with pytest.raises(ServiceError):
        asyncio.run(decision_of(called(engine, DecisionContext(AS_TRAINED)), PROMPT))


def test_margins_that_a_distant_worker_saw_are_asked_for_once_more() -> None:
    engine = FakeEngine(distant=True, v2=True)
    context = DecisionContext(AS_TRAINED, report=True)
    assert collected(called(engine, context)) == [[TEXT]]
    assert context.decisions == {(0, 0): Decision(0, (1.0, -1.0), 2.0)}
    assert [request_id for _, _, request_id in engine.calls] == ["id", "id-decision"]
    assert engine.calls[1][1].logprob_token_ids == MANIFEST.control_ids


@pytest.mark.parametrize("field", [{}, {"repetition_penalty": 1.1}])
def test_distant_worker_with_drafts_has_no_margins_to_report(field: dict[str, Any]) -> None:
    engine = FakeEngine(distant=True, v2=True, drafts=True)
    with pytest.raises(RequestError, match="margins that this needs cannot come back"):
        collected(called(engine, DecisionContext(AS_TRAINED, report=True), parameters(**field)))
    assert_all_rows_are_free(engine)


@pytest.mark.parametrize("field", [{}, {"repetition_penalty": 1.1}])
def test_distant_worker_of_v1_has_no_margins_to_report(
    field: dict[str, Any], recorder: MarginRecorder, tmp_path: Path
) -> None:
    engine = FakeEngine(recorder, distant=True)
    for context in (
        DecisionContext(AS_TRAINED, report=True),
        DecisionContext(AS_TRAINED, enforce=False),
    ):
        with pytest.raises(RequestError, match="margins that this needs cannot come back"):
            collected(called(engine, context, parameters(**field)))
    assert collected(called(engine, DecisionContext(AS_TRAINED), parameters(**field))) == [[TEXT]]
    assert rows(recorder, tmp_path) == 0
    assert all(params.logprob_token_ids is None for _, params, _ in engine.calls)
    assert_all_rows_are_free(engine)


@pytest.mark.parametrize("field", [{}, {"repetition_penalty": 1.1}])
@pytest.mark.parametrize("distant", [False, True])
def test_policy_in_the_shadow_responds_and_says_what_it_would_refuse(
    field: dict[str, Any], distant: bool
) -> None:
    engine = FakeEngine(answers=True, distant=distant, v2=distant)
    context = DecisionContext(AS_TRAINED, enforce=False)
    assert collected(called(engine, context, parameters(**field))) == [[TEXT]]
    (decision,) = context.decisions.values()
    assert (decision.category, decision.shadow) == (None, 0)
    never = Controls.never(2).to_wire()
    sent = engine.calls[0][1].extra_args[EXTRA_ARGS_KEY]
    assert {key: sent[key] for key in never} == never
    dialled = Resolution(Controls(Rule.GREEDY, (-2.0, 0.0), (True, False)))
    context = DecisionContext(dialled, enforce=False)
    collected(called(FakeEngine(answers=True), context))
    assert context.decisions[0, 0].shadow is None


def test_recorded_request_is_counted_once(recorder: MarginRecorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    context = DecisionContext(AS_TRAINED)
    collected(called(engine, context, parameters(n=3)))
    assert len(engine.calls) == 1
    assert [d.category for d in context.decisions.values()] == [0, 0, 0]
    assert rows(recorder, tmp_path) == 1


def test_sampled_choices_of_one_prompt_have_one_row_of_margins(
    recorder: MarginRecorder, tmp_path: Path
) -> None:
    sampled = Resolution(Controls(Rule.SAMPLE, (0.0, 0.0), (False, False)))
    collected(called(FakeEngine(recorder), DecisionContext(sampled), parameters(n=3)))
    assert rows(recorder, tmp_path) == 1


def test_margins_of_adapters_are_not_the_checkpoints(
    recorder: MarginRecorder, tmp_path: Path
) -> None:
    engine = FakeEngine(recorder)
    collected(called(engine, DecisionContext(AS_TRAINED), lora_request="adapter"))
    assert len(engine.calls) == 1
    assert rows(recorder, tmp_path) == 0


def test_decision_alone_is_no_traffic(recorder: MarginRecorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    context = DecisionContext(AS_TRAINED, report=True)
    decision = asyncio.run(decision_of(called(engine, context), PROMPT))
    assert decision == Decision(0, (1.0, -1.0), 2.0)
    assert context.decisions == {}
    assert len(engine.calls) == 1
    assert rows(recorder, tmp_path) == 0
