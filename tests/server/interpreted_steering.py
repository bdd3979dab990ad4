"""The GPU's kernel; test_steering_kernel.py runs this file where Triton interprets it."""

import random
from pathlib import Path

import pytest
import torch

from models.controls import Rule
from tests.server.steered_rows import MAX_REQUESTS, V2, Request, Row, logits, serve_toy


@pytest.mark.parametrize("seed", range(8))
def test_kernel_does_what_the_torch_operations_do(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    processor = V2(serve_toy(tmp_path / "toy"), drafts=2)
    requests = {
        slot: Request(rng, steered=rng.random() < 0.8, rules=[Rule.GREEDY])
        for slot in rng.sample(range(MAX_REQUESTS), 9)
    }
    processor.admit(requests)
    rows = [
        Row(slot, requests[slot].prompt_len + start + draft)
        for slot in rng.sample(list(requests), 7)
        for start in [rng.choice([-1, 0, 0, 1])]
        for draft in range(rng.choice([1, 3]))
    ]
    before = logits(len(rows), seed)

    assert torch.equal(processor.apply_kernel(before, *rows), processor.apply(before, *rows))


def test_kernel_gives_the_first_of_equals(tmp_path: Path) -> None:
    processor = V2(serve_toy(tmp_path / "toy"))
    request = Request(random.Random(0), rules=[Rule.GREEDY])
    processor.admit({0: request})
    before = logits(1, 0).zero_()
    row = Row(0, request.prompt_len)

    assert torch.equal(processor.apply_kernel(before, row), processor.apply(before, row))
