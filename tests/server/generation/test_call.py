"""One call of ``generate()`` on a fake engine; tests/e2e has the real one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.errors import RequestError
from models.histogram import load_margins
from server.context import Decision, DecisionContext
from server.dials.board import Resolution
from server.generation.call import Generation
from server.generation.margins import ROWS, MarginBoard, Ticket
from server.generation.outputs import Hider
from server.margin_rows import write_rows
from server.telemetry.recorder import MarginRecorder
from server.web.errors import Failure, failure
from tests.server.contexts import AS_TRAINED
from tests.server.manifests import MANIFEST

SAFETY, HUMANIZING, RESPOND = 10, 11, 12
OPENING = [3, 4]
TEXT = 7
MARK = 20
# Opens a turn.
TURN = 21
PROMPT = {"type": "token", "prompt_token_ids": [1, 2, *OPENING]}


class FakeEngine:
    """Decides for safety, with the raw log-probabilities -1, -3 and -2; else writes one token.

    Args:
        recorder: Counts margins.
        silent: Whether it gives no output at all.
        distant: Whether its worker is on another machine.
        v2: Whether vLLM's V2 model runner works for it.
        answers: Whether it decides to respond.
        ends_with: Why its texts end.
    """

    def __init__(
        self,
        recorder: MarginRecorder | None = None,
        *,
        silent: bool = False,
        distant: bool = False,
        v2: bool = False,
        answers: bool = False,
        ends_with: str = "stop",
    ) -> None:
        self.manifest = MANIFEST
        self.hider = Hider(MANIFEST, "mark")
        self.mark_id = MARK
        self.margin_board = MarginBoard(2)
        self.distant = distant
        self.margins_by_logprobs = v2
        self.opens_with = RESPOND if answers else SAFETY
        self.ends_with = ends_with
        self.opening = OPENING
        self.turn_ids = frozenset({TURN})
        self.category_of = {SAFETY: 0, HUMANIZING: 1}
        self.model_config: Any = SimpleNamespace(max_model_len=16)
        self.recorder = recorder
        self.silent = silent
        self.calls: list[tuple[list[int], Any, str]] = []

    def failure(self, error: Exception) -> Failure:
        return failure(500, str(error))

    async def generate_stock(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        ids = prompt["prompt_token_ids"]
        self.calls.append((ids, sampling_params, request_id))
        if self.silent:
            return
        wire = (sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
        tokens = [self.opens_with, TEXT] if wire else [TEXT]
        stopped = tokens[0] in (sampling_params.stop_token_ids or ())
        if wire and "ticket" in wire and not self.distant:
            ticket = Ticket(*wire["ticket"])
            raw = torch.tensor([[-1.0, -3.0, -2.0]])
            write_rows([ticket], torch.tensor([float(ticket.tag)]), torch.zeros(1), raw)
        logprobs = None
        if sampling_params.logprob_token_ids:
            values = {SAFETY: -1.0, HUMANIZING: -3.0, RESPOND: -2.0}
            logprobs = [{i: SimpleNamespace(logprob=value) for i, value in values.items()}]
        if request_id.endswith("-decision") or stopped:
            tokens = tokens[:1]
        choices = [
            SimpleNamespace(
                index=index,
                token_ids=list(tokens),
                logprobs=logprobs,
                cumulative_logprob=None,
                text="" if stopped else "No.",
                finish_reason="stop" if wire else self.ends_with,
                stop_reason=tokens[0] if stopped else None,
            )
            for index in range(sampling_params.n)
        ]
        yield SimpleNamespace(
            outputs=choices,
            finished=True,
            metrics=None,
            prompt=None,
            prompt_logprobs=None,
            prompt_token_ids=ids,
        )

    def decision_params(self, params: Any, *, choices: int, margins: bool) -> Any:
        ids = self.manifest.control_ids if margins else None
        return parameters(n=choices, logprob_token_ids=ids, temperature=params.temperature)

    def vllm_error(self, error: RequestError) -> Exception:
        return RequestError(error.message, param=error.param, status=error.status)

    async def merge(self, streams: Sequence[Any], params: Any) -> AsyncGenerator[Any, None]:
        for index, stream in enumerate(streams):
            async for output in stream:
                output.outputs[0].index = index
                yield output


def parameters(**changed: Any) -> Any:
    """Returns what stands for vLLM's ``SamplingParams``."""
    fields: dict[str, Any] = {
        "n": 1,
        "temperature": 0.0,
        "seed": None,
        "max_tokens": 5,
        "min_tokens": 0,
        "logit_bias": None,
        "allowed_token_ids": None,
        "stop_token_ids": None,
        "logprob_token_ids": None,
        "prompt_logprobs": None,
        "logprobs": None,
        "structured_outputs": None,
        "bad_words": [],
        "_bad_words_token_ids": None,
        "ignore_eos": False,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "thinking_token_budget": None,
        "skip_special_tokens": True,
        "stream_interval": None,
        "extra_args": None,
        "output_kind": SimpleNamespace(name="FINAL_ONLY"),
        "_all_stop_token_ids": set(),
    }
    return SimpleNamespace(**{**fields, **changed})


def streamed(**changed: Any) -> Any:
    """Returns parameters of an answer that is sent piece by piece."""
    return parameters(output_kind=SimpleNamespace(name="DELTA"), **changed)


def generation(
    engine: FakeEngine, context: DecisionContext, params: Any = None, **options: Any
) -> Generation:
    return Generation(engine, context, 0, params or parameters(), "id", options)


def collected(call: Generation, prompt: Any = PROMPT) -> list[list[int]]:
    async def collect() -> list[list[int]]:
        return [
            choice.token_ids async for output in call.outputs(prompt) for choice in output.outputs
        ]

    return asyncio.run(collect())


@pytest.fixture
def recorder(tmp_path: Path) -> MarginRecorder:
    return MarginRecorder(tmp_path / "margins.json", 1.0, MANIFEST.names, "a" * 64)


def rows(recorder: MarginRecorder, tmp_path: Path) -> int:
    recorder.flush()
    policies = load_margins(tmp_path / "margins.json").policies
    return policies["default"].rows if policies else 0


def test_one_pass_decides_and_hides_its_token() -> None:
    engine = FakeEngine()
    context = DecisionContext(AS_TRAINED)
    assert collected(generation(engine, context)) == [[TEXT]]
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
        generation(
            engine, DecisionContext(AS_TRAINED), parameters(seed=seed, temperature=temperature)
        )
    )
    assert len(engine.calls) == passes


def test_report_reads_what_the_worker_wrote_in_the_one_pass() -> None:
    engine = FakeEngine()
    context = DecisionContext(AS_TRAINED, report=True)
    assert collected(generation(engine, context)) == [[TEXT]]
    assert context.decisions == {(0, 0): Decision(0, (1.0, -1.0), 2.0)}
    assert [request_id for _, _, request_id in engine.calls] == ["id"]
    assert_all_rows_are_free(engine)


def assert_all_rows_are_free(engine: FakeEngine) -> None:
    async def take_all() -> None:
        for _ in range(ROWS):
            await engine.margin_board.take()

    asyncio.run(asyncio.wait_for(take_all(), timeout=30))


def test_margins_that_a_distant_worker_saw_are_asked_for_once_more() -> None:
    engine = FakeEngine(distant=True, v2=True)
    context = DecisionContext(AS_TRAINED, report=True)
    assert collected(generation(engine, context)) == [[TEXT]]
    assert context.decisions == {(0, 0): Decision(0, (1.0, -1.0), 2.0)}
    assert [request_id for _, _, request_id in engine.calls] == ["id", "id-decision"]
    assert engine.calls[1][1].logprob_token_ids == MANIFEST.control_ids


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
            collected(generation(engine, context, parameters(**field)))
    assert collected(generation(engine, DecisionContext(AS_TRAINED), parameters(**field))) == [
        [TEXT]
    ]
    assert rows(recorder, tmp_path) == 0
    assert all(params.logprob_token_ids is None for _, params, _ in engine.calls)
    assert_all_rows_are_free(engine)


@pytest.mark.parametrize("field", [{"repetition_penalty": 1.1}, {"skip_special_tokens": False}])
@pytest.mark.parametrize("v2", [False, True])
def test_decision_comes_first_where_a_field_reaches_its_logits(
    field: dict[str, Any], v2: bool
) -> None:
    engine = FakeEngine(v2=v2)
    context = DecisionContext(AS_TRAINED, report=True)
    assert collected(generation(engine, context, parameters(**field))) == [[TEXT]]
    assert context.decisions == {(0, 0): Decision(0, (1.0, -1.0), 2.0)}
    (_, decision, name), (continued, answer, _) = engine.calls
    assert name == "id-decision"
    assert decision.logprob_token_ids == (MANIFEST.control_ids if v2 else None)
    assert continued == [1, 2, *OPENING, SAFETY]
    assert answer.extra_args is None


def texts(call: Generation) -> list[tuple[str, list[int], str, Any]]:
    async def collect() -> list[tuple[str, list[int], str, Any]]:
        return [
            (choice.text, choice.token_ids, choice.finish_reason, choice.stop_reason)
            async for output in call.outputs(PROMPT)
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
    ended = texts(generation(engine, context, parameters(n=choices, **field)))
    assert ended == [("Ask the desk.", [], "stop", None)] * choices
    assert len(engine.calls) == 1
    assert context.refusal_texts == {(0, i): "Ask the desk." for i in range(choices)}


@pytest.mark.parametrize("field", [{}, {"min_tokens": 2}])
def test_fixed_text_of_another_category_and_answers_go_on(field: dict[str, Any]) -> None:
    other = DecisionContext(AS_TRAINED, texts=(None, "Ask the desk."))
    assert texts(generation(FakeEngine(), other, parameters(**field)))[0][1] == [TEXT]
    own = DecisionContext(AS_TRAINED, texts=("Ask the desk.", None))
    answering = FakeEngine(answers=True)
    assert texts(generation(answering, own, parameters(**field)))[0][1] == [TEXT]


@pytest.mark.parametrize("field", [{}, {"repetition_penalty": 1.1}])
@pytest.mark.parametrize("distant", [False, True])
def test_policy_in_the_shadow_responds_and_says_what_it_would_refuse(
    field: dict[str, Any], distant: bool
) -> None:
    engine = FakeEngine(answers=True, distant=distant, v2=distant)
    context = DecisionContext(AS_TRAINED, enforce=False)
    assert collected(generation(engine, context, parameters(**field))) == [[TEXT]]
    (decision,) = context.decisions.values()
    assert (decision.category, decision.shadow) == (None, 0)
    never = Controls.never(2).to_wire()
    sent = engine.calls[0][1].extra_args[EXTRA_ARGS_KEY]
    assert {key: sent[key] for key in never} == never
    dialled = Resolution(Controls(Rule.GREEDY, (-2.0, 0.0), (True, False)))
    context = DecisionContext(dialled, enforce=False)
    collected(generation(FakeEngine(answers=True), context))
    assert context.decisions[0, 0].shadow is None


def test_marks_never_reach_the_engine() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [MARK, 1, MARK, MARK, 2, *OPENING]}
    context = DecisionContext(AS_TRAINED, opens_turn=True, marked=True)
    collected(generation(engine, context), prompt)
    assert engine.calls[0][0] == [1, 2, *OPENING]


def test_mark_that_the_guard_did_not_set_is_no_token() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [1, MARK, 2]}
    with pytest.raises(RequestError, match=f"the id {MARK}, which is no token"):
        collected(generation(engine, DecisionContext(AS_TRAINED)), prompt)
    assert engine.calls == []


def test_grammar_that_no_text_follows_is_the_requests_fault() -> None:
    engine = FakeEngine(answers=True, ends_with="error")
    params = parameters(structured_outputs=SimpleNamespace())
    with pytest.raises(RequestError, match="no text follows the grammar") as raised:
        collected(generation(engine, DecisionContext(AS_TRAINED), params))
    assert raised.value.status == 400
    other = parameters(bad_words=["x"])  # in two passes too, and ended by the engine's own fault
    assert collected(generation(engine, DecisionContext(AS_TRAINED), other)) == [[TEXT]]
    refusing = FakeEngine(ends_with="error")  # its text follows no grammar
    assert collected(generation(refusing, DecisionContext(AS_TRAINED), params)) == [[TEXT]]


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
        collected(generation(engine, context, parameters(**shaped)))
        _, sent, _ = engine.calls[-1]
        kept = parameters() if has_floor and not answers else parameters(**shaped)
        if name == "min_tokens" and not has_floor:
            kept.min_tokens += 1  # one pass, which has a token more
        assert getattr(sent, name) == getattr(kept, name)


def test_conversation_has_to_end_where_the_decision_begins() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [1, *OPENING, 2]}
    with pytest.raises(RequestError, match="does not end where"):
        collected(generation(engine, DecisionContext(AS_TRAINED, opens_turn=True)), prompt)
    assert engine.calls == []
    collected(generation(engine, DecisionContext(AS_TRAINED)), prompt)
    assert len(engine.calls) == 1


def test_beams_have_no_fixed_texts() -> None:
    context = DecisionContext(AS_TRAINED, beam_search=True, texts=("Ask the desk.", None))
    with pytest.raises(RequestError, match="use_beam_search"):
        collected(generation(FakeEngine(), context))


def test_recorded_request_is_counted_once(recorder: MarginRecorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    context = DecisionContext(AS_TRAINED)
    collected(generation(engine, context, parameters(n=3)))
    assert len(engine.calls) == 1
    assert [d.category for d in context.decisions.values()] == [0, 0, 0]
    assert rows(recorder, tmp_path) == 1


def test_sampled_choices_of_one_prompt_have_one_row_of_margins(
    recorder: MarginRecorder, tmp_path: Path
) -> None:
    sampled = Resolution(Controls(Rule.SAMPLE, (0.0, 0.0), (False, False)))
    collected(generation(FakeEngine(recorder), DecisionContext(sampled), parameters(n=3)))
    assert rows(recorder, tmp_path) == 1


def test_margins_of_adapters_are_not_the_checkpoints(
    recorder: MarginRecorder, tmp_path: Path
) -> None:
    engine = FakeEngine(recorder)
    collected(generation(engine, DecisionContext(AS_TRAINED), lora_request="adapter"))
    assert len(engine.calls) == 1
    assert rows(recorder, tmp_path) == 0


def test_decision_alone_is_no_traffic(recorder: MarginRecorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    context = DecisionContext(AS_TRAINED, report=True)
    decision = asyncio.run(generation(engine, context).decision(PROMPT))
    assert decision == Decision(0, (1.0, -1.0), 2.0)
    assert context.decisions == {}
    assert len(engine.calls) == 1
    assert rows(recorder, tmp_path) == 0


def test_too_long_prompt_reaches_no_engine() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [1] * 15}
    with pytest.raises(RequestError, match="may have 14"):
        collected(generation(engine, DecisionContext(AS_TRAINED)), prompt)
    with pytest.raises(RequestError, match="may have 14"):
        asyncio.run(generation(engine, DecisionContext(AS_TRAINED)).decision(prompt))
    second = Generation(engine, DecisionContext(AS_TRAINED), 1, parameters(), "id", {})
    with pytest.raises(RequestError, match="may have 14"):
        collected(second, prompt)
    assert engine.calls == []


def test_log_probabilities_of_all_prompts_are_bounded_together() -> None:
    engine = FakeEngine()
    context = DecisionContext(
        AS_TRAINED, history=(0, 0), logprobs=2 * 3 * 4 + 2 * len(PROMPT["prompt_token_ids"])
    )
    params = parameters(n=2, max_tokens=4, logprobs=2, prompt_logprobs=0)
    assert collected(generation(engine, context, params)) == [[TEXT], [TEXT]]
    assert context.logprobs == 0
    with pytest.raises(RequestError, match=r"1 log-probabilities more .*RHEOSTAT_MAX_LOGPROBS"):
        collected(generation(engine, context, parameters(logprobs=0, max_tokens=1)))
    assert len(engine.calls) == 1


def test_answer_whose_length_nobody_names_holds_the_log_probabilities_that_fit() -> None:
    engine = FakeEngine()
    context = DecisionContext(AS_TRAINED, logprobs=2 * 3 * 4 + 5, names_length=False)
    params = parameters(n=2, max_tokens=400, logprobs=2)
    collected(generation(engine, context, params))
    ((_, sent, _),) = engine.calls
    assert sent.max_tokens == 4 + 1  # the decision takes a step


def test_step_of_a_stream_holds_so_many_log_probabilities_of_all_prompts() -> None:
    fits = {"n": 2, "logprobs": 4, "stream_interval": 3}
    context = DecisionContext(AS_TRAINED, history=(0, 0), piece_logprobs=60, prompts=2)
    engine = FakeEngine()
    collected(generation(engine, context, streamed(**fits)))
    assert len(engine.calls) == 1
    with pytest.raises(RequestError, match=r"hold 72 .*at most 60 .*RHEOSTAT_MAX_LOGPROBS") as e:
        collected(generation(engine, context, streamed(**{**fits, "logprobs": 5})))
    assert (e.value.status, e.value.param) == (422, "logprobs")
    collected(generation(engine, context, parameters(**{**fits, "logprobs": 5})))


def test_decision_that_never_came_is_an_error() -> None:
    engine = FakeEngine(silent=True)
    with pytest.raises(RequestError, match="aborted"):
        collected(
            generation(engine, DecisionContext(AS_TRAINED), parameters(repetition_penalty=1.1))
        )


def test_call_tells_the_http_layer_that_it_began_or_why_it_was_rejected() -> None:
    context = DecisionContext(AS_TRAINED, opens_turn=True)
    collected(generation(FakeEngine(), context), {**PROMPT, "prompt_token_ids": OPENING})
    assert (context.started, context.failure) == (True, None)
    context = DecisionContext(AS_TRAINED)
    with pytest.raises(RequestError):
        collected(
            generation(FakeEngine(), context), {"type": "token", "prompt_token_ids": [1] * 15}
        )
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
        collected(generation(Rejecting(), context))
    assert context.failure == failure(500, "vLLM's")
