"""Both processors against a slow reference that knows requests, not rows."""

import asyncio
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from server.generation.margins import MarginBoard
from tests.server.steered_rows import (
    CATEGORIES,
    MAX_REQUESTS,
    V2,
    VOCABULARY,
    Request,
    Row,
    Served,
    asking,
    assert_seen,
    assert_text_row,
    chosen,
    logits,
    serve_toy,
    v1,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return serve_toy(tmp_path_factory.mktemp("toy"))


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


def test_v2_with_drafts_of_others_writes_the_margins(served: Served, tmp_path: Path) -> None:
    board = MarginBoard(CATEGORIES, tmp_path)
    ticket = asyncio.run(board.take())
    request, writing = Request(random.Random(47)), Request(random.Random(48))
    asking(request, ticket)
    processor = V2(served, drafts=2)
    processor.admit({6: request, 3: writing})
    drafted = [Row(3, writing.prompt_len + 1 + draft) for draft in range(3)]
    before = logits(4, 48)
    processor.apply(before, *drafted, Row(6, request.prompt_len))
    assert_seen(board, ticket, before[3], served.manifest)


def test_v2_ranks_that_sample_their_own_requests_decide_as_one(
    served: Served, tmp_path: Path
) -> None:
    """vLLM's --enable-batch-sharded-sampling: the rank of slot modulo ranks samples it."""
    rng, ranks = random.Random(49), 3
    board = MarginBoard(CATEGORIES, tmp_path)
    requests = {slot: Request(rng) for slot in range(8)}
    tickets = {slot: asyncio.run(board.take()) for slot in requests if slot % 2}
    for slot, ticket in tickets.items():
        asking(requests[slot], ticket)
    processors = [V2(served) for _ in range(ranks)]
    for processor in processors:  # every rank knows every request
        processor.admit(requests)
    before = logits(len(requests), 50)
    for rank in rng.sample(range(ranks), ranks):
        owned = [slot for slot in requests if slot % ranks == rank]
        rows = [Row(slot, requests[slot].prompt_len) for slot in owned]
        for slot, row in zip(owned, processors[rank].apply(before[owned], *rows), strict=True):
            assert chosen(row) == requests[slot].reference(served.config, before[slot])
    for slot, ticket in tickets.items():
        assert_seen(board, ticket, before[slot], served.manifest)
