"""One call of ``generate()`` on a fake engine; tests/e2e has the real one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.errors import RequestError
from models.histogram import load_margins
from server.context import Decision, Steering
from server.dials import Resolution
from server.generation import Generation
from server.hiding import Hider
from server.recorder import MarginRecorder
from tests.server.manifests import MANIFEST

SAFETY, HUMANIZING, RESPOND = 10, 11, 12
OPENING = [3, 4]
TEXT = 7
PROMPT = {"type": "token", "prompt_token_ids": [1, 2, *OPENING]}
AS_TRAINED = Resolution(Controls.as_trained(2))


class FakeEngine:
    """Decides for safety, with the raw log-probabilities -1, -3 and -2; else writes one token.

    Args:
        recorder: Counts margins.
        silent: Whether it gives no output at all.
    """

    def __init__(self, recorder: MarginRecorder | None = None, *, silent: bool = False) -> None:
        self.manifest = MANIFEST
        self.hider = Hider(MANIFEST)
        self.opening = OPENING
        self.category_of = {SAFETY: 0, HUMANIZING: 1}
        self.model_config: Any = SimpleNamespace(max_model_len=16)
        self.recorder = recorder
        self.silent = silent
        self.calls: list[tuple[list[int], Any, str]] = []

    async def generate_stock(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        ids = prompt["prompt_token_ids"]
        self.calls.append((ids, sampling_params, request_id))
        if self.silent:
            return
        decides = EXTRA_ARGS_KEY in (sampling_params.extra_args or {})
        tokens = [SAFETY, TEXT] if decides else [TEXT]
        logprobs = None
        if sampling_params.logprob_token_ids:
            values = {SAFETY: -1.0, HUMANIZING: -3.0, RESPOND: -2.0}
            logprobs = [{i: SimpleNamespace(logprob=value) for i, value in values.items()}]
            tokens = [SAFETY]
        choices = [
            SimpleNamespace(
                index=index,
                token_ids=list(tokens),
                logprobs=logprobs,
                cumulative_logprob=None,
                text="No.",
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

    async def merge(self, streams: Sequence[Any], params: Any) -> AsyncGenerator[Any, None]:
        for stream in streams:
            async for output in stream:
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
        "structured_outputs": None,
        "bad_words": None,
        "repetition_penalty": 1.0,
        "thinking_token_budget": None,
        "skip_special_tokens": True,
        "extra_args": None,
        "output_kind": SimpleNamespace(name="FINAL_ONLY"),
        "_all_stop_token_ids": set(),
    }
    return SimpleNamespace(**{**fields, **changed})


def generation(
    engine: FakeEngine, steering: Steering, params: Any = None, **options: Any
) -> Generation:
    return Generation(engine, steering, 0, params or parameters(), "id", options)


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
    steering = Steering(AS_TRAINED)
    assert collected(generation(engine, steering)) == [[TEXT]]
    assert steering.decisions == {(0, 0): Decision(0)}
    ((ids, params, request_id),) = engine.calls
    assert (ids, request_id) == (PROMPT["prompt_token_ids"], "id")
    assert params.max_tokens == 6
    assert params.extra_args[EXTRA_ARGS_KEY] == AS_TRAINED.controls.to_wire()


def test_report_takes_a_pass_of_its_own() -> None:
    engine = FakeEngine()
    steering = Steering(AS_TRAINED, report=True)
    assert collected(generation(engine, steering)) == [[TEXT]]
    assert steering.decisions == {(0, 0): Decision(0, (1.0, -1.0), 2.0)}
    (_, decision, name), (continued, answer, _) = engine.calls
    assert name == "id-decision"
    assert decision.logprob_token_ids == MANIFEST.control_ids
    assert continued == [1, 2, *OPENING, SAFETY]
    assert answer.extra_args is None


def test_recorded_request_takes_a_pass_of_its_own_and_is_counted_once(
    recorder: MarginRecorder, tmp_path: Path
) -> None:
    engine = FakeEngine(recorder)
    steering = Steering(AS_TRAINED)
    collected(generation(engine, steering, parameters(n=3)))
    assert len(engine.calls) == 4  # one decision, three answers
    assert [d.category for d in steering.decisions.values()] == [0, 0, 0]
    assert rows(recorder, tmp_path) == 1


def test_sampled_choices_of_one_prompt_have_one_row_of_margins(
    recorder: MarginRecorder, tmp_path: Path
) -> None:
    sampled = Resolution(Controls(Rule.SAMPLE, (0.0, 0.0), (False, False)))
    collected(generation(FakeEngine(recorder), Steering(sampled), parameters(n=3)))
    assert rows(recorder, tmp_path) == 1


def test_margins_of_adapters_are_not_the_checkpoints(
    recorder: MarginRecorder, tmp_path: Path
) -> None:
    engine = FakeEngine(recorder)
    collected(generation(engine, Steering(AS_TRAINED), lora_request="adapter"))
    assert len(engine.calls) == 1
    assert rows(recorder, tmp_path) == 0


def test_decision_alone_is_no_traffic(recorder: MarginRecorder, tmp_path: Path) -> None:
    engine = FakeEngine(recorder)
    steering = Steering(AS_TRAINED, report=True)
    decision = asyncio.run(generation(engine, steering).decision(PROMPT))
    assert decision == Decision(0, (1.0, -1.0), 2.0)
    assert steering.decisions == {}
    assert len(engine.calls) == 1
    assert rows(recorder, tmp_path) == 0


def test_too_long_prompt_reaches_no_engine() -> None:
    engine = FakeEngine()
    prompt = {"type": "token", "prompt_token_ids": [1] * 15}
    with pytest.raises(RequestError, match="may have 14"):
        collected(generation(engine, Steering(AS_TRAINED)), prompt)
    with pytest.raises(RequestError, match="may have 14"):
        asyncio.run(generation(engine, Steering(AS_TRAINED)).decision(prompt))
    assert engine.calls == []


def test_decision_that_never_came_is_an_error() -> None:
    engine = FakeEngine(silent=True)
    with pytest.raises(RequestError, match="aborted"):
        collected(generation(engine, Steering(AS_TRAINED, report=True)))
