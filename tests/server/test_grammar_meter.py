"""What a grammar may cost the engine; tests/e2e has grammars on the real one."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from server.generation.grammars import LIMIT_KEY
from server.steering import FREE_S, PricedGrammar, SteeredAsyncScheduler, SteeredScheduler


class SlowGrammar(StructuredOutputGrammar):
    """Takes so much time of its thread for each step.

    Args:
        step_s: How much.
    """

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.steps = 0

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self._work()
        return True

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        self._work()
        return tokens

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        self._work()

    def rollback(self, num_tokens: int) -> None: ...

    def is_terminated(self) -> bool:
        return False

    def reset(self) -> None: ...

    def _work(self) -> None:
        self.steps += 1
        until_s = time.thread_time() + self.step_s
        while time.thread_time() < until_s:
            pass


def test_grammar_that_took_too_long_ends_its_request_and_costs_no_more() -> None:
    slow = SlowGrammar(3 * FREE_S)
    priced = PricedGrammar(slow, 3 * FREE_S)
    mask = torch.zeros(1, 1, dtype=torch.int32)
    priced.fill_bitmask(mask, 0)
    assert priced.accept_tokens("id", [1])
    for _ in range(3):
        assert not priced.accept_tokens("id", [1])
        assert priced.validate_tokens([1]) == []
        priced.fill_bitmask(mask, 0)
    assert slow.steps == 2


def test_quick_grammar_may_go_on_for_ever() -> None:
    quick = SlowGrammar(0.0)
    priced = PricedGrammar(quick, FREE_S)
    assert all(priced.accept_tokens("id", [1]) for _ in range(1000))
    assert priced.validate_tokens([1, 2]) == [1, 2]


def test_grammar_that_gave_up_ends_its_request() -> None:
    matcher: Any = SimpleNamespace(
        get_error=lambda: "", is_stopped=lambda: False, consume_tokens=lambda tokens: True
    )
    tokenizer: Any = SimpleNamespace(eos_token=0)
    grammar = GuidanceGrammar(matcher, tokenizer, vocab_size=2)
    priced = PricedGrammar(grammar, 1.0)
    assert priced.accept_tokens("id", [1])
    matcher.get_error = lambda: "too many items"
    grammar.check_error()  # type: ignore[no-untyped-call]
    assert not priced.accept_tokens("id", [0])


@pytest.mark.parametrize(
    ("ours", "stock"),
    [(SteeredScheduler, Scheduler), (SteeredAsyncScheduler, AsyncScheduler)],
)
def test_schedulers_price_every_grammar_once(
    ours: type[Scheduler], stock: type[Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "get_grammar_bitmask", lambda self, output: "masks")
    scheduler: Any = ours.__new__(ours)
    scheduler.vllm_config = SimpleNamespace(additional_config={LIMIT_KEY: 1.0})
    asked = SimpleNamespace(grammar=SlowGrammar(0.0))
    plain = SimpleNamespace(structured_output_request=None)
    scheduler.requests = {"a": SimpleNamespace(structured_output_request=asked), "b": plain}
    output: Any = SimpleNamespace(
        has_structured_output_requests=True, num_scheduled_tokens={"a": 1, "b": 1, "gone": 1}
    )
    assert scheduler.get_grammar_bitmask(output) == "masks"
    priced: Any = asked.grammar
    assert isinstance(priced, PricedGrammar)
    scheduler.get_grammar_bitmask(output)
    assert asked.grammar is priced
