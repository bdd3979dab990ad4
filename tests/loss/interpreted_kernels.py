"""The GPU's kernels; test_softmax_kernels.py runs this file where Triton interprets them."""

import pytest
import torch
from torch.nn import functional

from loss.softmax_kernels import read_logits, write_gradient_


@pytest.mark.parametrize("vocabulary", [1, 7, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_gradient(vocabulary: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(vocabulary)
    logits = (5 * torch.randn(4, vocabulary, generator=draw)).to(dtype)
    targets = torch.randint(vocabulary, (4,), generator=draw)
    slopes = torch.randn(4, generator=draw)
    every = logits.double().log_softmax(-1)
    onehot = functional.one_hot(targets, vocabulary)
    gradient = slopes.double()[:, None] * (onehot - every.exp())

    log_probs, normalisers = read_logits(logits, targets)
    write_gradient_(logits, targets, normalisers, slopes)

    wanted = every.gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(log_probs.double(), wanted, rtol=1e-6, atol=1e-6)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), gradient, rtol=rounding, atol=1e-6)


def test_part_of_a_larger_buffer_and_no_rows() -> None:
    buffer = torch.zeros(4, 8)
    targets = torch.zeros(2, dtype=torch.int64)

    log_probs, normalisers = read_logits(buffer[:2], targets)
    write_gradient_(buffer[:2], targets, normalisers, torch.full((2,), -8.0))

    assert log_probs.tolist() == pytest.approx([-2.0794415] * 2)
    assert buffer[0].tolist() == pytest.approx([-7.0] + [1.0] * 7)
    assert not buffer[2:].any()
    assert read_logits(buffer[:0], targets[:0])[0].shape == (0,)


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e30, -1e29], [-float("inf"), 3.0], [3e38, 3e38]])
    targets = torch.tensor([0, 1, 1])

    log_probs, normalisers = read_logits(logits, targets)
    write_gradient_(logits, targets, normalisers, torch.full((3,), -1.0))

    assert log_probs.tolist() == pytest.approx([0.0, 0.0, -0.6931472])
    assert logits.tolist() == [[0.0, 0.0], [0.0, 0.0], pytest.approx([0.5, -0.5])]
