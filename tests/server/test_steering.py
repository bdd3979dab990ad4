"""Both processors against a slow reference that knows requests, not rows."""

import asyncio
import math
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.manifest import Manifest
from server.context import TURN_IDS_KEY
from server.generation.grammars import LIMIT_KEY
from server.generation.margins import MarginBoard, Margins, Ticket
from server.steering import (
    FREE_S,
    PricedGrammar,
    SteeredAsyncScheduler,
    SteeredScheduler,
    SteeringV1,
    SteeringV2,
)
from tests.toy import save_toy

VOCABULARY = 300
CATEGORIES = 5
MAX_REQUESTS = 16
# Opens a turn, as far as the server has told the worker.
TURN_ID = 150


class Served(NamedTuple):
    """A toy checkpoint and the config that a worker would see."""

    manifest: Manifest
    config: Any


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    directory: Path = tmp_path_factory.mktemp("toy")
    manifest = save_toy(directory)
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(directory)),
        speculative_config=None,
        additional_config={TURN_IDS_KEY: [TURN_ID]},
    )
    return Served(manifest, config)


class Request:
    """One request of the reference: it decides once, for itself."""

    def __init__(self, rng: random.Random, *, steered: bool = True) -> None:
        biases = [-math.inf, -2.0, 0.0, 0.5, 3.0, math.inf]
        self.controls = Controls(
            rule=rng.choice(list(Rule)),
            bias=tuple(rng.choice(biases) for _ in range(CATEGORIES)),
            selected=tuple(rng.random() < 0.5 for _ in range(CATEGORIES)),
        )
        self.steered = steered
        self.params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.5]),
            seed=rng.randrange(2**31),
            extra_args={EXTRA_ARGS_KEY: self.controls.to_wire()} if steered else None,
        )
        self.prompt_len = rng.randrange(3, 40)
        self.output: list[int] = []

    def reference(self, config: Any, row: torch.Tensor) -> int:
        """Decides alone, in a batch of one, with a fresh processor."""
        alone = SteeringV1(config, torch.device("cpu"), is_pin_memory=False)
        alone.update_state(BatchUpdate(1, [], [(0, self.params, None, [])], []))
        return int(alone.apply(row.clone().unsqueeze(0)).argmax())


def v1(served: Served) -> SteeringV1:
    return SteeringV1(served.config, torch.device("cpu"), is_pin_memory=False)


class SlotStates:
    """The part of vLLM's per-slot state that the V2 processor reads."""

    def __init__(self) -> None:
        lengths = torch.zeros(MAX_REQUESTS, dtype=torch.int64)
        self.device = torch.device("cpu")
        self.max_num_reqs = MAX_REQUESTS
        self.prompt_len = SimpleNamespace(np=lengths.numpy(), gpu=lengths)


class Row(NamedTuple):
    """One row of logits: whose it is, and how many tokens stand before the sampled one."""

    slot: int
    length: int


def context(rows: list[Row]) -> Any:
    """Builds vLLM's batch layout; rows of one slot must stand together."""
    slots = list(dict.fromkeys(row.slot for row in rows))
    bounds = [max(row.length for row in rows if row.slot == slot) for slot in slots]
    return SimpleNamespace(
        expanded_idx_mapping=torch.tensor([row.slot for row in rows], dtype=torch.int32),
        idx_mapping=torch.tensor(slots, dtype=torch.int32),
        idx_mapping_np=np.array(slots, dtype=np.int32),
        pos=torch.tensor([row.length - 1 for row in rows]),
        seq_lens_upper_bound_np=np.array(bounds, dtype=np.int32),
    )


def v2(served: Served, states: SlotStates) -> SteeringV2:
    return SteeringV2(served.config, states)  # type: ignore[arg-type]


def admit(processor: SteeringV2, states: SlotStates, slot: int, request: Request) -> None:
    states.prompt_len.np[slot] = request.prompt_len
    processor.add_request(slot, request.params)
    processor.apply_staged_writes()


def logits(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCABULARY, generator=generator) * 3


def chosen(row: torch.Tensor) -> int:
    """Returns the one token that a decision row leaves open."""
    open_tokens = (row > -math.inf).nonzero().flatten().tolist()
    assert len(open_tokens) == 1
    return int(open_tokens[0])


def assert_text_row(before: torch.Tensor, after: torch.Tensor, manifest: Manifest) -> None:
    """Nothing but control tokens and what opens a turn changed, and these are masked."""
    expected = before.clone()
    expected[[*manifest.control_ids, TURN_ID]] = -math.inf
    assert torch.equal(after, expected)


def test_v1_first_step_decides_and_later_steps_only_mask(served: Served) -> None:
    request = Request(random.Random(1))
    processor = v1(served)
    processor.update_state(BatchUpdate(1, [], [(0, request.params, None, request.output)], []))
    first = logits(1, 1)
    token = chosen(processor.apply(first.clone())[0])
    assert token == request.reference(served.config, first[0])
    assert token in served.manifest.control_ids

    request.output.append(token)
    processor.update_state(None)
    later = logits(1, 2)
    assert_text_row(later[0], processor.apply(later.clone())[0], served.manifest)


def test_v1_batches_of_other_dials_are_decided_anew(served: Served) -> None:
    row = torch.zeros(1, VOCABULARY)
    always_first, always_last = Request(random.Random(1)), Request(random.Random(1))
    for request, category in ((always_first, 0), (always_last, CATEGORIES - 1)):
        bias = [0.0] * CATEGORIES
        bias[category] = math.inf
        controls = Controls(Rule.GREEDY, tuple(bias), (True,) * CATEGORIES)
        request.params.extra_args = {EXTRA_ARGS_KEY: controls.to_wire()}
    first, last = served.manifest.control_ids[0], served.manifest.control_ids[CATEGORIES - 1]

    # Each asks twice, so that the second time its dials were seen before.
    requests = [always_first, always_last, always_first, always_last]

    assert [r.reference(served.config, row[0]) for r in requests] == [first, last] * 2


def test_v1_decides_the_same_on_a_slice_of_padded_logits(served: Served) -> None:
    requests = [Request(random.Random(seed)) for seed in (50, 51, 52)]
    added: Any = [(i, r.params, None, r.output) for i, r in enumerate(requests)]
    padded = torch.full((3, VOCABULARY + 20), 99.0)
    padded[:, :VOCABULARY] = logits(3, 53)
    view = padded[:, :VOCABULARY]
    expected = [r.reference(served.config, row) for r, row in zip(requests, view, strict=True)]
    processor = v1(served)
    processor.update_state(BatchUpdate(3, [], added, []))
    assert [chosen(row) for row in processor.apply(view)] == expected
    assert (padded[:, VOCABULARY:] == 99.0).all()


def test_v1_unsteered_request_is_never_decided(served: Served) -> None:
    request = Request(random.Random(2), steered=False)
    processor = v1(served)
    processor.update_state(BatchUpdate(1, [], [(0, request.params, None, request.output)], []))
    row = logits(1, 3)
    assert_text_row(row[0], processor.apply(row.clone())[0], served.manifest)


def test_v1_chunked_prefill_stays_undecided_until_the_first_token(served: Served) -> None:
    request = Request(random.Random(3))
    processor = v1(served)
    processor.update_state(BatchUpdate(1, [], [(0, request.params, None, request.output)], []))
    for seed in (4, 5, 6):
        row = logits(1, seed)
        token = chosen(processor.apply(row.clone())[0])
        assert token == request.reference(served.config, row[0])
        processor.update_state(None)


def test_v1_resumed_request_is_not_decided_again(served: Served) -> None:
    request = Request(random.Random(4))
    request.output = [42, 43]
    processor = v1(served)
    processor.update_state(BatchUpdate(1, [], [(0, request.params, None, request.output)], []))
    row = logits(1, 7)
    assert_text_row(row[0], processor.apply(row.clone())[0], served.manifest)


def test_v1_moves_swaps_and_replacements_follow_the_request(served: Served) -> None:
    """A random walk over vLLM's batch updates, each step checked request by request."""
    rng = random.Random(11)
    processor = v1(served)
    batch: dict[int, Request] = {}
    for step in range(200):
        removed = [i for i in list(batch) if rng.random() < 0.2]
        for index in removed:
            del batch[index]
        moved: list[tuple[int, int, MoveDirectionality]] = []
        added = []
        for _ in range(rng.randrange(3)):
            index = rng.randrange(8)
            request = Request(rng, steered=rng.random() < 0.8)
            batch[index] = request
            added.append((index, request.params, None, request.output))
        if batch and rng.random() < 0.5:
            source, target = rng.choice(list(batch)), rng.randrange(8)
            if source != target and target in batch:
                moved.append((source, target, MoveDirectionality.SWAP))
                batch[source], batch[target] = batch[target], batch[source]
            elif source != target:
                moved.append((source, target, MoveDirectionality.UNIDIRECTIONAL))
                batch[target] = batch.pop(source)
        update = BatchUpdate(8, removed, added, moved) if removed or added or moved else None
        processor.update_state(update)
        before = logits(8, 1000 + step)
        after = processor.apply(before.clone())
        for index, request in batch.items():
            if request.steered and not request.output:
                assert chosen(after[index]) == request.reference(served.config, before[index])
            else:
                assert_text_row(before[index], after[index], served.manifest)
            if rng.random() < 0.7:
                request.output.append(1)


def test_v2_gives_the_v1_result_on_reordered_rows(served: Served) -> None:
    rng = random.Random(21)
    requests = {slot: Request(rng) for slot in rng.sample(range(MAX_REQUESTS), 10)}
    states = SlotStates()
    processor = v2(served, states)
    for slot, request in requests.items():
        admit(processor, states, slot, request)
    for step in range(5):
        order = rng.sample(list(requests), len(requests))
        before = logits(len(order), 50 + step)
        rows = [Row(slot, requests[slot].prompt_len) for slot in order]
        after = processor.apply(before.clone(), context(rows))
        for index, slot in enumerate(order):
            expected = requests[slot].reference(served.config, before[index])
            assert chosen(after[index]) == expected


def test_v2_mixes_decision_text_and_unsteered_rows(served: Served) -> None:
    rng = random.Random(22)
    deciding, writing, plain = Request(rng), Request(rng), Request(rng, steered=False)
    states = SlotStates()
    processor = v2(served, states)
    for slot, request in ((3, deciding), (1, writing), (2, plain)):
        admit(processor, states, slot, request)
    before = logits(3, 60)
    rows = [Row(1, writing.prompt_len + 4), Row(3, deciding.prompt_len), Row(2, plain.prompt_len)]
    after = processor.apply(before.clone(), context(rows))
    assert_text_row(before[0], after[0], served.manifest)
    assert chosen(after[1]) == deciding.reference(served.config, before[1])
    assert_text_row(before[2], after[2], served.manifest)


def test_v2_recycled_slot_forgets_its_last_request(served: Served) -> None:
    rng = random.Random(23)
    states = SlotStates()
    processor = v2(served, states)
    for step in range(20):
        request = Request(rng, steered=step % 3 != 2)
        admit(processor, states, 5, request)
        before = logits(1, 70 + step)
        after = processor.apply(before.clone(), context([Row(5, request.prompt_len)]))
        if request.steered:
            assert chosen(after[0]) == request.reference(served.config, before[0])
        else:
            assert_text_row(before[0], after[0], served.manifest)


def test_v2_chunked_prefill_decides_only_at_the_end_of_the_prompt(served: Served) -> None:
    request = Request(random.Random(24))
    states = SlotStates()
    processor = v2(served, states)
    admit(processor, states, 0, request)
    before = logits(1, 90)
    part = processor.apply(before.clone(), context([Row(0, request.prompt_len - 1)]))
    assert_text_row(before[0], part[0], served.manifest)
    whole = processor.apply(before.clone(), context([Row(0, request.prompt_len)]))
    assert chosen(whole[0]) == request.reference(served.config, before[0])


def test_v2_preempted_request_is_not_decided_again(served: Served) -> None:
    """On resumption prefill covers prompt and output; only the prompt's length counts."""
    request = Request(random.Random(25))
    states = SlotStates()
    processor = v2(served, states)
    admit(processor, states, 4, request)
    admit(processor, states, 9, request)  # resumed in another slot, three tokens later
    before = logits(1, 91)
    after = processor.apply(before.clone(), context([Row(9, request.prompt_len + 3)]))
    assert_text_row(before[0], after[0], served.manifest)


def test_v2_several_rows_a_request_decide_on_the_first_only(served: Served) -> None:
    """Under speculative decoding a request owns one row a draft."""
    request, other = Request(random.Random(26)), Request(random.Random(27))
    drafting = SimpleNamespace(
        model_config=served.config.model_config,
        speculative_config=SimpleNamespace(num_speculative_tokens=2),
        additional_config=served.config.additional_config,
    )
    states = SlotStates()
    processor = SteeringV2(drafting, states)  # type: ignore[arg-type]
    admit(processor, states, 6, request)
    admit(processor, states, 7, other)
    start = request.prompt_len
    rows = [Row(6, start), Row(6, start + 1), Row(6, start + 2), Row(7, other.prompt_len)]
    before = logits(4, 92)
    after = processor.apply(before.clone(), context(rows))
    assert chosen(after[0]) == request.reference(served.config, before[0])
    assert_text_row(before[1], after[1], served.manifest)
    assert_text_row(before[2], after[2], served.manifest)
    assert chosen(after[3]) == other.reference(served.config, before[3])


def test_v2_steps_without_decisions_only_mask(served: Served) -> None:
    requests = [Request(random.Random(seed)) for seed in (28, 29)]
    states = SlotStates()
    processor = v2(served, states)
    for slot, request in enumerate(requests):
        admit(processor, states, slot, request)
    before = logits(2, 93)
    rows = [Row(slot, request.prompt_len + 7) for slot, request in enumerate(requests)]
    after = processor.apply(before.clone(), context(rows))
    for index in range(2):
        assert_text_row(before[index], after[index], served.manifest)


def asking(request: Request, ticket: Ticket) -> None:
    assert request.params.extra_args is not None
    request.params.extra_args[EXTRA_ARGS_KEY]["ticket"] = list(ticket)


def expected_margins(row: torch.Tensor, manifest: Manifest) -> Margins:
    own = row[manifest.control_ids]
    margins = (own[:-1] - own[-1]).tolist()
    return Margins(float(row.logsumexp(0) - own[-1]), tuple(margins))


def assert_seen(board: MarginBoard, ticket: Ticket, row: torch.Tensor, manifest: Manifest) -> None:
    seen, expected = board.read(ticket), expected_margins(row, manifest)
    assert seen is not None
    assert seen.margins == expected.margins
    assert seen.log_normaliser == pytest.approx(expected.log_normaliser, abs=1e-5)


def test_v1_writes_the_margins_of_those_who_ask(served: Served, tmp_path: Path) -> None:
    rng = random.Random(40)
    board = MarginBoard(CATEGORIES, tmp_path)
    requests = [Request(rng) for _ in range(4)]
    tickets = {index: asyncio.run(board.take()) for index in (1, 3)}
    for index, ticket in tickets.items():
        asking(requests[index], ticket)
    processor = v1(served)
    added = [(i, request.params, None, request.output) for i, request in enumerate(requests)]
    processor.update_state(BatchUpdate(4, [], added, []))
    before = logits(4, 41)
    after = processor.apply(before.clone())
    for index, request in enumerate(requests):
        assert chosen(after[index]) == request.reference(served.config, before[index])
        request.output.append(1)
    for index, ticket in tickets.items():
        assert_seen(board, ticket, before[index], served.manifest)
    processor.update_state(None)
    processor.apply(logits(4, 42))
    for index, ticket in tickets.items():
        assert_seen(board, ticket, before[index], served.manifest)


def test_v2_writes_the_margins_of_those_who_ask(served: Served, tmp_path: Path) -> None:
    rng = random.Random(43)
    board = MarginBoard(CATEGORIES, tmp_path)
    asked, silent, writing = Request(rng), Request(rng), Request(rng)
    ticket = asyncio.run(board.take())
    asking(asked, ticket)
    states = SlotStates()
    processor = v2(served, states)
    for slot, request in ((2, asked), (5, silent), (9, writing)):
        admit(processor, states, slot, request)
    part = logits(1, 44)
    processor.apply(part, context([Row(2, asked.prompt_len - 1)]))
    assert board.read(ticket) is None
    before = logits(3, 45)
    rows = [Row(9, writing.prompt_len + 1), Row(5, silent.prompt_len), Row(2, asked.prompt_len)]
    processor.apply(before.clone(), context(rows))
    assert_seen(board, ticket, before[2], served.manifest)
    processor.apply(logits(1, 46), context([Row(2, asked.prompt_len + 1)]))
    assert_seen(board, ticket, before[2], served.manifest)


def test_v2_with_drafts_writes_no_margins(served: Served, tmp_path: Path) -> None:
    board = MarginBoard(CATEGORIES, tmp_path)
    ticket = asyncio.run(board.take())
    request = Request(random.Random(47))
    asking(request, ticket)
    drafting = SimpleNamespace(
        model_config=served.config.model_config,
        speculative_config=SimpleNamespace(num_speculative_tokens=2),
        additional_config=served.config.additional_config,
    )
    states = SlotStates()
    processor = SteeringV2(drafting, states)  # type: ignore[arg-type]
    admit(processor, states, 6, request)
    rows = [Row(6, request.prompt_len), Row(6, request.prompt_len + 1)]
    processor.apply(logits(2, 48), context(rows))
    assert board.read(ticket) is None


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
