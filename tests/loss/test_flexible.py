"""The loss against 120-digit arithmetic, over the whole range that it is meant for."""

import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from loss.flexible import flexible_loss, flexible_loss_and_slope
from tests.loss.reference import Exact, flexible

LOG_P = (-1e4, -500.0, -120.0, -88.0, -40.0, -9.0, -1.0, -0.51, -0.5, -0.1, -1e-3, -1e-7, -1e-20)
Q = (-1.0, -0.7, -0.01, -1e-4, -1e-7, -1e-20, 0.0, 1e-20, 1e-7, 1e-4, 0.01, 0.7, 1.0, 2.0)
GAMMA = (0.0, 0.01, 0.5, 1.0, 1.5, 2.0, 5.0)


class Case(NamedTuple):
    log_p: float
    q: float
    gamma: float
    exact: tuple[Exact, Exact, Exact]


@cache
def cases(dtype: torch.dtype) -> tuple[Case, ...]:
    """The grid, rounded to what the dtype holds, and the truth for the rounded numbers."""
    rows = torch.tensor(list(product(LOG_P, Q, GAMMA)), dtype=torch.float64)
    rows = rows.to(dtype).double()
    return tuple(Case(x, q, gamma, flexible(x, q, gamma)) for x, q, gamma in rows.tolist())


def derivatives(log_probs: Tensor, q: float | Tensor, gamma: float | Tensor) -> tuple[Tensor, ...]:
    x = log_probs.detach().clone().requires_grad_()
    value = flexible_loss(x, q, gamma)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    if not first.requires_grad:  # cross-entropy: constant
        return value, first, torch.zeros_like(first)
    (second,) = torch.autograd.grad(first.sum(), x)
    return value.detach(), first.detach(), second


def errors(
    dtype: torch.dtype,
    input_dtype: torch.dtype,
    compute: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] = derivatives,
) -> Iterator[tuple[float, int, Case, float]]:
    """Yields the error in roundings, the derivative's order, the case and what came out."""
    known = cases(input_dtype)
    x, q, gamma = torch.tensor([case[:3] for case in known], dtype=torch.float64).T
    results = compute(x.to(dtype), q.to(dtype), gamma.to(dtype))
    info = torch.finfo(dtype)
    for order, result in enumerate(results):
        for case, got in zip(known, result.tolist(), strict=True):
            if case.exact[0].value > Decimal(info.max):
                continue
            assert math.isfinite(got), (order, case)
            exact = case.exact[order]
            # The arguments of exp and pow are rounded, gamma as part of gamma + 1.
            roundings = 1 + abs(case.q * case.log_p) + abs(math.log(-case.log_p))
            if order == 2 and 0 < case.gamma < 1:
                roundings += 1 / case.gamma
            scale = float(exact.size) * info.eps * roundings + info.tiny
            yield abs(float(Decimal(got) - exact.value)) / scale, order, case, got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_value_and_both_derivatives_are_right_to_a_few_roundings(dtype: torch.dtype) -> None:
    worst = max(errors(dtype, torch.float32), key=lambda error: error[0])
    assert worst[0] < 8, worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_slope_without_a_graph_is_as_right(dtype: torch.dtype) -> None:
    worst = max(errors(dtype, torch.float32, flexible_loss_and_slope), key=lambda error: error[0])
    assert worst[0] < 8, worst


def test_slope_without_a_graph_where_the_truth_is_out_of_reach() -> None:
    x = torch.tensor([-math.inf, -1e4, -90.0, -1e-7, 0.0, 1e-3, math.nan])
    for q, gamma in product((-1.0, -0.1, 0.0, 1e-30, 1.0, 2.0), (0.0, 0.5, 1.0, 5.0)):
        value, first, _ = derivatives(x, q, gamma)
        loss, slope = flexible_loss_and_slope(x, q, gamma)
        torch.testing.assert_close(loss, value, rtol=1e-4, atol=1e-20, equal_nan=True)
        torch.testing.assert_close(slope, first, rtol=1e-4, atol=1e-20, equal_nan=True)


def test_bfloat16_derivatives_are_right_to_their_own_rounding() -> None:
    known = cases(torch.bfloat16)
    x, q, gamma = torch.tensor([case[:3] for case in known], dtype=torch.float64).T
    results = derivatives(x.bfloat16(), q.float(), gamma.float())
    info = torch.finfo(torch.bfloat16)
    assert [result.dtype for result in results] == [torch.float32, *[torch.bfloat16] * 2]
    for order, result in enumerate(results[1:], start=1):
        for case, got in zip(known, result.tolist(), strict=True):
            if case.exact[0].value > Decimal(torch.finfo(torch.float32).max):
                continue
            exact = case.exact[order]
            # Half a rounding, and what float32 had lost of terms that cancel.
            lost = float(exact.size) * 2**-23 * 8 * (2 + abs(case.q * case.log_p))
            if order == 2 and 0 < case.gamma < 1:
                lost /= case.gamma
            allowed = abs(float(exact.value)) * info.eps / 2 + lost + info.tiny
            assert abs(float(Decimal(got) - exact.value)) <= allowed, (order, case, got)


def test_bfloat16_is_widened_before_anything_is_computed() -> None:
    log_probs = torch.tensor([-1e4, -3.0, -0.3, -1e-3, 0.0], dtype=torch.bfloat16)
    for q, gamma in product((-0.5, 0.0, 0.7), (0.0, 0.5, 2.0)):
        loss = flexible_loss(log_probs, q, gamma)
        assert loss.dtype == torch.float32
        assert loss.equal(flexible_loss(log_probs.float(), q, gamma))
        narrow = derivatives(log_probs, q, gamma)
        wide = derivatives(log_probs.float(), q, gamma)
        assert narrow[1].dtype == torch.bfloat16
        assert narrow[1].equal(wide[1].bfloat16())
        assert narrow[2].isfinite().all()


def test_values_by_hand() -> None:
    half = torch.tensor([math.log(0.5)], dtype=torch.float64)

    def loss(q: float, gamma: float) -> float:
        return flexible_loss(half, q, gamma).item()

    assert loss(0, 0) == pytest.approx(0.6931471805599453, rel=1e-15)
    assert loss(0, 2) == pytest.approx(0.25 * 0.6931471805599453, rel=1e-15)
    assert loss(1, 0) == pytest.approx(0.5, rel=1e-15)
    assert loss(1, 1) == pytest.approx(0.25, rel=1e-15)
    assert loss(2, 0) == pytest.approx(0.375, rel=1e-15)
    assert loss(-1, 0) == pytest.approx(1.0, rel=1e-15)
    assert loss(0.5, 3) == pytest.approx(0.125 * 2 * (1 - math.sqrt(0.5)), rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("gamma", "first", "second"),
    [(0.0, -1.0, None), (1e-3, 0.0, 0.0), (0.5, 0.0, 0.0), (1.0, 0.0, 2.0), (1.5, 0.0, 0.0)],
)
@pytest.mark.parametrize("q", [-1.0, 0.0, 1e-3, 1.0, 2.0])
def test_at_p_of_1(
    dtype: torch.dtype, q: float, gamma: float, first: float, second: float | None
) -> None:
    value, slope, curvature = derivatives(torch.zeros(3, dtype=dtype), q, gamma)
    expected = -q if second is None else second
    assert value.tolist() == [0.0] * 3
    assert slope.tolist() == [first] * 3
    assert curvature.tolist() == pytest.approx([expected] * 3, rel=1e-6, abs=0)


def test_first_derivative_vanishes_steadily_towards_p_of_1() -> None:
    x = -torch.logspace(-37, -1, 300)
    for gamma in (0.1, 0.5, 0.9):
        _, first, second = derivatives(x, 0.3, gamma)
        assert first.diff().le(0).all()
        assert second.isfinite().all()


def test_rounding_above_0_counts_as_certain() -> None:
    for gamma in (0.0, 0.5, 2.0):
        value, first, second = derivatives(torch.tensor([1e-7, 1e-3]), 0.5, gamma)
        assert not value.any()
        assert not first.any()
        assert not second.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("q", [-1.0, -0.5, -0.1, -0.08])
def test_beyond_the_range_the_loss_stays_at_the_largest_number(
    dtype: torch.dtype, q: float
) -> None:
    x = torch.tensor([-1e4, -1e6, -math.inf], dtype=dtype)
    largest = torch.finfo(dtype).max
    for gamma in (0.0, 0.5, 5.0):
        value, first, second = derivatives(x, q, gamma)
        assert value.ge(0.98 * largest).all()
        assert value.le(largest).all()
        assert not first.any()
        assert not second.any()


def test_impossible_class_is_finite_for_every_q() -> None:
    x = torch.tensor([-math.inf])
    assert flexible_loss(x, 0.0, 0.0).item() == pytest.approx(1e30)
    assert flexible_loss(x, 0.5, 2.0).item() == pytest.approx(2.0)
    for q, gamma in product((-1.0, 0.0, 1e-6, 1.0, 2.0), (0.0, 0.5, 5.0)):
        assert all(part.isfinite().all() for part in derivatives(x, q, gamma))


def test_nan_is_not_hidden() -> None:
    for q, gamma in product((-1.0, 0.0, 1.0), (0.0, 0.5, 2.0)):
        loss = flexible_loss(torch.tensor([math.nan, -1.0]), q, gamma)
        assert loss.isnan().tolist() == [True, False]


def test_q_towards_0_from_both_sides_is_cross_entropy() -> None:
    x = -torch.logspace(-6, 4, 60)
    truth = derivatives(x, 0.0, 0.7)
    for q in (1e-12, -1e-12, 1e-30, -1e-30, 1e-45, -1e-45):
        for got, expected in zip(derivatives(x, q, 0.7), truth, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-11)


def test_gradcheck_in_all_three_arguments() -> None:
    x = torch.tensor([-6.0, -3.0, -0.7, -0.49, -0.2], dtype=torch.float64)[:, None]
    q = torch.tensor([-0.9, 0.0, 0.02, 0.7, 2.0], dtype=torch.float64)
    gamma = torch.tensor([0.3, 0.6, 1.0, 2.0, 4.5], dtype=torch.float64)
    inputs = (x.expand(5, 5).clone(), q, gamma)
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(flexible_loss, inputs)
    assert torch.autograd.gradgradcheck(flexible_loss, inputs)


def test_parameters_per_row_and_per_element_equal_one_call_each() -> None:
    x = -torch.rand(3, 4) * 5
    q = torch.tensor([[-0.5], [0.0], [1.0]])
    gamma = torch.tensor([[0.0, 0.5, 1.0, 2.0]])
    together = flexible_loss(x, q, gamma)
    for i, j in product(range(3), range(4)):
        alone = flexible_loss(x[i, j], q[i, 0].item(), gamma[0, j].item())
        torch.testing.assert_close(together[i, j], alone)


def test_gradients_reach_learnt_parameters() -> None:
    x = torch.tensor([0.0, -1e-8, -0.3, -2.0, -50.0])
    for start in (0.0, 0.5, 1.0):
        q = torch.tensor(start, requires_grad=True)
        gamma = torch.tensor(start, requires_grad=True)
        torch.autograd.backward(flexible_loss(x, q, gamma).sum())
        assert q.grad is not None
        assert q.grad.isfinite()
        assert gamma.grad is not None
        assert gamma.grad.isfinite()


def test_wrong_arguments_are_named() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="gamma must be finite and at least 0, not -1"):
        flexible_loss(x, 0.0, -1.0)
    with pytest.raises(ValueError, match="q must be finite, not nan"):
        flexible_loss(x, math.nan, 0.0)
    with pytest.raises(ValueError, match=r"q of shape \[2\] does not broadcast .* \[2, 3\]"):
        flexible_loss(x, torch.zeros(2), 0.0)
    with pytest.raises(ValueError, match=r"gamma of shape \[4, 2, 3\]"):
        flexible_loss(x, 0.0, torch.zeros(4, 2, 3))
    with pytest.raises(ValueError, match=r"floating point, not torch\.int64"):
        flexible_loss(torch.zeros(2, dtype=torch.int64), 0.0, 0.0)


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(flexible_loss, fullgraph=True, backend="aot_eager")
    x = torch.tensor([-1e4, -20.0, -0.6, -0.3, -1e-6, 0.0])
    q = torch.tensor([-1.0, -0.5, 0.0, 1e-6, 0.7, 2.0])
    gamma = torch.tensor([5.0, 0.0, 0.5, 1.0, 2.0, 0.5])
    ours, plain = (x.clone().requires_grad_() for _ in range(2))
    value, expected = compiled(ours, q, gamma), flexible_loss(plain, q, gamma)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-12)
    torch.autograd.backward(value.sum())
    torch.autograd.backward(expected.sum())
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-12)
