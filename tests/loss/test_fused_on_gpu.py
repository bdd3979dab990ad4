"""The fused head on a GPU, where other kernels and products run than on a CPU."""

import pytest
import torch

from tests.loss.test_fused import Problem, assert_same, distance, gradients_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: Triton's compiled kernels cannot run"
)


def _problem(dtype: torch.dtype) -> Problem:
    return Problem(tokens=300, width=16, vocabulary=5001, dtype=dtype).to("cuda")


@pytest.mark.parametrize("chunk_tokens", [70, None])
def test_float64_equals_the_plain_loss(chunk_tokens: int | None) -> None:
    problem = _problem(torch.float64)

    found = problem.fused(0.7, 2.0, chunk_tokens=chunk_tokens)

    assert_same(problem, found, problem.plain(0.7, 2.0), 1e-10)


@pytest.mark.parametrize(("q", "gamma"), [(0.0, 0.0), (0.7, 2.0), (-0.5, 0.5)])
@pytest.mark.parametrize("chunk_tokens", [70, None])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_low_precision_is_as_exact_as_the_plain_loss(
    dtype: torch.dtype, rounding: float, q: float, gamma: float, chunk_tokens: int | None
) -> None:
    problem, exact = _problem(dtype), _problem(torch.float64)
    with torch.no_grad():
        exact.hidden.copy_(problem.hidden)
        exact.weight.copy_(problem.weight)

    found = problem.fused(q, gamma, chunk_tokens=chunk_tokens)
    plain = problem.plain(q, gamma)

    truth = exact.plain(q, gamma)
    assert distance(found.log_probs, truth.log_probs) < rounding
    assert distance(found.loss_sum, truth.loss_sum) < rounding
    own = gradients_of(found, problem.hidden, problem.weight)
    other = gradients_of(plain, problem.hidden, problem.weight)
    true = gradients_of(truth, exact.hidden, exact.weight)
    for one, plain_one, right in zip(own, other, true, strict=True):
        assert distance(one, right) < max(1.5 * distance(plain_one, right), rounding)


def test_same_result_every_time() -> None:
    problem = _problem(torch.bfloat16)

    first = gradients_of(problem.fused(), problem.hidden, problem.weight)
    again = gradients_of(problem.fused(), problem.hidden, problem.weight)

    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
