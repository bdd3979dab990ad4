"""The GPU's kernels; test_softmax_kernels.py runs this file where Triton interprets them."""

import pytest
import torch
from torch.nn import functional

from loss import fused
from loss.softmax_kernels import read_logits, write_gradient_
from tests.loss.test_fused import Problem, distance, gradients_of


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
    infinite = float("inf")
    logits = torch.tensor([[1e30, -1e29], [-infinite, 3.0], [3e38, 3e38], [-1e31, -1e31]])
    targets = torch.tensor([0, 1, 1, 0])

    log_probs, normalisers = read_logits(logits, targets)
    write_gradient_(logits, targets, normalisers, torch.full((4,), -1.0))

    assert log_probs.tolist() == pytest.approx([0.0, 0.0, -0.6931472, -0.6931472])
    half = pytest.approx([0.5, -0.5])
    assert logits.tolist() == [[0.0, 0.0], [0.0, 0.0], half, pytest.approx([-0.5, 0.5])]


@pytest.mark.parametrize("row", [[float("nan"), 1.0], [-float("inf")] * 2])
def test_what_has_no_softmax_is_nan(row: list[float]) -> None:
    assert read_logits(torch.tensor([row]), torch.tensor([1]))[0].isnan().all()


@pytest.mark.parametrize("target", [-1, 4])
def test_target_outside_is_nan_and_reads_no_other_row(target: int) -> None:
    buffer = torch.zeros(3, 4)

    log_probs, _ = read_logits(buffer, torch.tensor([0, target, 0]))

    assert log_probs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_head_through_the_kernels(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    problem, exact = Problem(dtype=dtype), Problem()
    with torch.no_grad():
        exact.hidden.copy_(problem.hidden)
        exact.weight.copy_(problem.weight)
    problem.token_weights[2] = exact.token_weights[2] = 0.0
    q = torch.linspace(-0.5, 1.0, 7)
    monkeypatch.setattr(fused, "_softmax", lambda *_: fused._to_gradient_in_kernels)

    found = problem.fused(q, 0.5, chunk_tokens=3)

    truth = exact.plain(q, 0.5)
    rounding = 10 * torch.finfo(dtype).eps
    assert distance(found.log_probs, truth.log_probs) < rounding
    true = gradients_of(truth, exact.hidden, exact.weight)
    for one, right in zip(gradients_of(found, problem.hidden, problem.weight), true, strict=True):
        assert distance(one, right) < rounding
