import math
import random

import pytest
import torch

from training.data.batches import (
    IGNORED,
    NOTHING,
    Collator,
    LengthBuckets,
    Loader,
    as_dataset,
)
from training.data.encoding import Example


def random_rows(count: int, seed: int = 0) -> list[Example]:
    draw = random.Random(seed)
    examples = []
    for _ in range(count):
        length = draw.randint(3, 12)
        weights = [0.0, 0.0, 10.0] + [1.0] * (length - 3)
        examples.append(Example([draw.randrange(1, 50) for _ in range(length)], weights))
    return examples


def test_collator_pads_on_the_right_and_hides_what_weighs_nothing() -> None:
    batch = Collator(pad_id=9)(
        [
            {"input_ids": [1, 2, 3], "weights": [0.0, 5.0, 1.0]},
            {"input_ids": [4], "weights": [1.0]},
        ]
    )

    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3], [4, IGNORED, IGNORED]]
    assert batch["weights"].tolist() == [[0.0, 5.0, 1.0], [1.0, 0.0, 0.0]]


LENGTHS = [number % 13 for number in range(107)]


def test_buckets_hand_out_every_row_once_in_a_new_order_each_pass() -> None:
    order = LengthBuckets(LENGTHS, batch_size=8, seed=1)

    first = [row for batch in order for row in batch]
    again = [row for batch in order for row in batch]
    order.set_epoch(1)
    second = [row for batch in order for row in batch]

    assert sorted(first) == sorted(second) == list(range(107))
    assert first == again
    assert first != second
    assert len(order) == math.ceil(107 / 8)


def test_order_of_a_pass_does_not_depend_on_the_passes_before_it() -> None:
    straight = LengthBuckets(LENGTHS, batch_size=8, seed=1)
    straight.set_epoch(3)
    walked = LengthBuckets(LENGTHS, batch_size=8, seed=1)
    for number in range(4):
        walked.set_epoch(number)
        rows = list(walked)

    assert list(straight) == rows
    assert rows != list(LengthBuckets(LENGTHS, batch_size=8, seed=2))


def test_rows_of_one_batch_are_about_equally_long() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (400,), generator=generator).tolist()

    batches = [[lengths[row] for row in batch] for batch in LengthBuckets(lengths, 8, seed=0)]

    spreads = [max(batch) - min(batch) for batch in batches]
    assert sum(spreads) / len(spreads) < 5
    assert len(batches) == 50


@pytest.mark.parametrize(("accumulation", "processes"), [(4, 1), (2, 2), (1, 4)])
def test_steps_hold_the_same_rows_however_they_are_shared(
    accumulation: int, processes: int
) -> None:
    whole = list(LengthBuckets(LENGTHS, batch_size=16, seed=3))
    shares = [
        list(
            LengthBuckets(
                LENGTHS, 4, seed=3, accumulation=accumulation, processes=processes, process=process
            )
        )
        for process in range(processes)
    ]

    for step, rows in enumerate(whole):
        taken = [
            row
            for share in shares
            for batch in share[step * accumulation : (step + 1) * accumulation]
            for row in batch
            if row != NOTHING
        ]
        assert sorted(taken) == sorted(rows)
    assert {len(share) for share in shares} == {len(whole) * accumulation}


def test_process_without_a_row_in_the_last_step_gets_a_batch_that_weighs_nothing() -> None:
    examples = [Example([1, 2, 3], [0.0, 2.0, 1.0])] * 5
    orders = [LengthBuckets([3] * 5, 2, seed=0, processes=2, process=p) for p in (0, 1)]

    last = [list(Loader(as_dataset(examples), order, Collator(0)))[-1] for order in orders]

    assert sorted(float(batch["weights"].sum()) for batch in last) == [0.0, 3.0]


def test_packing_loses_no_token_and_fills_sequences() -> None:
    examples = random_rows(60)

    packed = as_dataset(examples, max_length=24)

    assert max(packed["length"]) <= 24
    assert sum(packed["length"]) == sum(len(example.input_ids) for example in examples)
    assert len(packed) <= math.ceil(sum(packed["length"]) / 24) + 1
    rows = sorted(example.input_ids for example in examples)
    found = []
    for sequence in packed:
        starts = [at for at, position in enumerate(sequence["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            found.append(sequence["input_ids"][start:stop])
    assert sorted(found) == rows


def test_row_longer_than_a_sequence_keeps_one_to_itself() -> None:
    packed = as_dataset([Example([1] * 9, [1.0] * 9), Example([2] * 3, [1.0] * 3)], 5)

    assert sorted(packed["length"]) == [3, 9]
    # Nothing before it predicts a row's first token.
    assert [weights[0] for weights in packed["weights"]] == [0.0, 0.0]
