"""Both processors against a slow reference that knows requests, not rows."""

import asyncio
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.manifest import Manifest
from server.context import TURN_IDS_KEY
from server.generation.margins import MarginBoard, Margins, Ticket
from server.steering import (
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
        """Decides in a batch of one."""
        return int(v1(config, self).apply(row.clone().unsqueeze(0)).argmax())


def v1(config: Any, *requests: Request) -> SteeringV1:
    """Returns the V1 processor with these requests in its batch."""
    processor = SteeringV1(config, torch.device("cpu"), is_pin_memory=False)
    added = [(i, request.params, None, request.output) for i, request in enumerate(requests)]
    processor.update_state(BatchUpdate(len(requests), [], added, []))
    return processor


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


class V2:
    """The V2 processor with the part of vLLM's per-slot state that it reads."""

    def __init__(self, served: Served, *, drafts: int = 0) -> None:
        self.lengths = torch.zeros(MAX_REQUESTS, dtype=torch.int64)
        states: Any = SimpleNamespace(
            device=torch.device("cpu"),
            max_num_reqs=MAX_REQUESTS,
            prompt_len=SimpleNamespace(np=self.lengths.numpy(), gpu=self.lengths),
        )
        speculative = SimpleNamespace(num_speculative_tokens=drafts) if drafts else None
        config = SimpleNamespace(**{**vars(served.config), "speculative_config": speculative})
        self._processor = SteeringV2(config, states)  # type: ignore[arg-type]

    def admit(self, requests: dict[int, Request]) -> None:
        """Puts requests into slots."""
        for slot, request in requests.items():
            self.lengths[slot] = request.prompt_len
            self._processor.add_request(slot, request.params)
            self._processor.apply_staged_writes()

    def apply(self, before: torch.Tensor, *rows: Row) -> torch.Tensor:
        """Returns what one step makes of logits."""
        return self._processor.apply(before.clone(), context(list(rows)))


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
    processor = v1(served.config, request)
    first = logits(1, 1)
    token = chosen(processor.apply(first.clone())[0])
    assert token == request.reference(served.config, first[0])
    assert token in served.manifest.control_ids
    request.output.append(token)
    processor.update_state(None)
    later = logits(1, 2)
    assert_text_row(later[0], processor.apply(later.clone())[0], served.manifest)


def test_v1_batches_of_other_dials_are_decided_anew(served: Served) -> None:
    processor, decided = v1(served.config), []
    # Each asks twice: the second time the processor has seen its dials before.
    for category in (0, CATEGORIES - 1) * 2:
        request = Request(random.Random(1))
        bias = tuple(math.inf if c == category else 0.0 for c in range(CATEGORIES))
        controls = Controls(Rule.GREEDY, bias, (True,) * CATEGORIES)
        request.params.extra_args = {EXTRA_ARGS_KEY: controls.to_wire()}
        added: Any = [(0, request.params, None, request.output)]
        processor.update_state(BatchUpdate(1, [0], added, []))
        decided.append(chosen(processor.apply(torch.zeros(1, VOCABULARY))[0]))
    first, last = served.manifest.control_ids[0], served.manifest.control_ids[CATEGORIES - 1]
    assert decided == [first, last] * 2


def test_v1_decides_the_same_on_a_slice_of_padded_logits(served: Served) -> None:
    requests = [Request(random.Random(seed)) for seed in (50, 51, 52)]
    padded = torch.full((3, VOCABULARY + 20), 99.0)
    padded[:, :VOCABULARY] = logits(3, 53)
    view = padded[:, :VOCABULARY]
    expected = [r.reference(served.config, row) for r, row in zip(requests, view, strict=True)]
    processor = v1(served.config, *requests)
    assert [chosen(row) for row in processor.apply(view)] == expected
    assert (padded[:, VOCABULARY:] == 99.0).all()


def test_v1_chunked_prefill_stays_undecided_until_the_first_token(served: Served) -> None:
    request = Request(random.Random(3))
    processor = v1(served.config, request)
    for seed in (4, 5, 6):
        row = logits(1, seed)
        token = chosen(processor.apply(row.clone())[0])
        assert token == request.reference(served.config, row[0])
        processor.update_state(None)


def test_v1_resumed_request_is_not_decided_again(served: Served) -> None:
    request = Request(random.Random(4))
    request.output = [42, 43]
    processor = v1(served.config, request)
    row = logits(1, 7)
    assert_text_row(row[0], processor.apply(row.clone())[0], served.manifest)


def test_v1_moves_swaps_and_replacements_follow_the_request(served: Served) -> None:
    """A random walk over vLLM's batch updates, each step checked request by request."""
    rng = random.Random(11)
    processor = v1(served.config)
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
    processor = V2(served)
    processor.admit(requests)
    for step in range(5):
        order = rng.sample(list(requests), len(requests))
        before = logits(len(order), 50 + step)
        rows = [Row(slot, requests[slot].prompt_len) for slot in order]
        after = processor.apply(before, *rows)
        for index, slot in enumerate(order):
            expected = requests[slot].reference(served.config, before[index])
            assert chosen(after[index]) == expected


def test_v2_mixes_decision_text_and_unsteered_rows(served: Served) -> None:
    rng = random.Random(22)
    deciding, writing, plain = Request(rng), Request(rng), Request(rng, steered=False)
    processor = V2(served)
    processor.admit({3: deciding, 1: writing, 2: plain})
    before = logits(3, 60)
    rows = [Row(1, writing.prompt_len + 4), Row(3, deciding.prompt_len), Row(2, plain.prompt_len)]
    after = processor.apply(before, *rows)
    assert_text_row(before[0], after[0], served.manifest)
    assert chosen(after[1]) == deciding.reference(served.config, before[1])
    assert_text_row(before[2], after[2], served.manifest)


def test_v2_recycled_slot_forgets_its_last_request(served: Served) -> None:
    rng = random.Random(23)
    processor = V2(served)
    for step in range(20):
        request = Request(rng, steered=step % 3 != 2)
        processor.admit({5: request})
        before = logits(1, 70 + step)
        after = processor.apply(before, Row(5, request.prompt_len))
        if request.steered:
            assert chosen(after[0]) == request.reference(served.config, before[0])
        else:
            assert_text_row(before[0], after[0], served.manifest)


def test_v2_chunked_prefill_decides_only_at_the_end_of_the_prompt(served: Served) -> None:
    request = Request(random.Random(24))
    processor = V2(served)
    processor.admit({0: request})
    before = logits(1, 90)
    part = processor.apply(before, Row(0, request.prompt_len - 1))
    assert_text_row(before[0], part[0], served.manifest)
    whole = processor.apply(before, Row(0, request.prompt_len))
    assert chosen(whole[0]) == request.reference(served.config, before[0])


def test_v2_preempted_request_is_not_decided_again(served: Served) -> None:
    """On resumption prefill covers prompt and output; only the prompt's length counts."""
    request = Request(random.Random(25))
    processor = V2(served)
    # Resumed in another slot, three tokens later.
    processor.admit({4: request, 9: request})
    before = logits(1, 91)
    after = processor.apply(before, Row(9, request.prompt_len + 3))
    assert_text_row(before[0], after[0], served.manifest)


def test_v2_several_rows_a_request_decide_on_the_first_only(served: Served) -> None:
    """Under speculative decoding a request owns one row a draft."""
    request, other = Request(random.Random(26)), Request(random.Random(27))
    processor = V2(served, drafts=2)
    processor.admit({6: request, 7: other})
    start = request.prompt_len
    rows = [Row(6, start), Row(6, start + 1), Row(6, start + 2), Row(7, other.prompt_len)]
    before = logits(4, 92)
    after = processor.apply(before, *rows)
    assert chosen(after[0]) == request.reference(served.config, before[0])
    assert_text_row(before[1], after[1], served.manifest)
    assert_text_row(before[2], after[2], served.manifest)
    assert chosen(after[3]) == other.reference(served.config, before[3])


def test_v2_steps_without_decisions_only_mask(served: Served) -> None:
    requests = [Request(random.Random(seed)) for seed in (28, 29)]
    processor = V2(served)
    processor.admit(dict(enumerate(requests)))
    before = logits(2, 93)
    rows = [Row(slot, request.prompt_len + 7) for slot, request in enumerate(requests)]
    after = processor.apply(before, *rows)
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
    processor = v1(served.config, *requests)
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
    processor = V2(served)
    processor.admit({2: asked, 5: silent, 9: writing})
    part = logits(1, 44)
    processor.apply(part, Row(2, asked.prompt_len - 1))
    assert board.read(ticket) is None
    before = logits(3, 45)
    rows = [Row(9, writing.prompt_len + 1), Row(5, silent.prompt_len), Row(2, asked.prompt_len)]
    processor.apply(before, *rows)
    assert_seen(board, ticket, before[2], served.manifest)
    processor.apply(logits(1, 46), Row(2, asked.prompt_len + 1))
    assert_seen(board, ticket, before[2], served.manifest)


def test_v2_with_drafts_writes_no_margins(served: Served, tmp_path: Path) -> None:
    board = MarginBoard(CATEGORIES, tmp_path)
    ticket = asyncio.run(board.take())
    request = Request(random.Random(47))
    asking(request, ticket)
    processor = V2(served, drafts=2)
    processor.admit({6: request})
    rows = [Row(6, request.prompt_len), Row(6, request.prompt_len + 1)]
    processor.apply(logits(2, 48), *rows)
    assert board.read(ticket) is None
