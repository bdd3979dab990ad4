from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loss.flexible import flexible_loss
from loss.fused import FusedLoss, OutputLayer, TrainedRows, fused_flexible_loss, weighted_rows

Parameter = float | Tensor


class Problem:
    """Random hidden states, matrix, targets and weights; leaves that ask for a gradient."""

    def __init__(
        self, tokens: int = 7, width: int = 5, vocabulary: int = 11, dtype: Any = torch.float64
    ) -> None:
        draw = torch.Generator().manual_seed(tokens * 100 + vocabulary)
        self.hidden = torch.randn(tokens, width, generator=draw, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(vocabulary, width, generator=draw, dtype=torch.float64).to(dtype)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        self.targets = torch.randint(vocabulary, (tokens,), generator=draw)
        self.token_weights = torch.rand(tokens, generator=draw) + 0.1

    def to(self, device: str) -> "Problem":
        """Moves everything."""
        for name, value in vars(self).items():
            setattr(self, name, value.detach().to(device).requires_grad_(value.requires_grad))
        return self

    def fused(
        self, q: Parameter = 0.7, gamma: Parameter = 2.0, *added: Any, **rest: Any
    ) -> FusedLoss:
        """``added``: the layer's bias and trained rows."""
        layer = OutputLayer(self.weight, *added)
        return fused_flexible_loss(
            self.hidden, layer, self.targets, self.token_weights, q, gamma, **rest
        )

    def plain(
        self, q: Parameter = 0.7, gamma: Parameter = 2.0, bias: Tensor | None = None
    ) -> FusedLoss:
        logits = torch.nn.functional.linear(self.hidden, self.weight, bias)
        exact = logits if logits.dtype == torch.float64 else logits.float()
        every = exact.log_softmax(-1)
        log_probs = every.gather(-1, self.targets.clamp(min=0)[:, None]).squeeze(-1)
        kept = self.token_weights > 0
        losses = flexible_loss(log_probs.where(kept, 0.0), q, gamma)
        return FusedLoss((losses * self.token_weights).sum(), log_probs.detach().where(kept, 0.0))


def gradients_of(loss: FusedLoss, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(3.0 * loss.loss_sum, leaves)


def assert_same(problem: Problem, found: FusedLoss, wanted: FusedLoss, tolerance: float) -> None:
    close: Callable[..., None] = torch.testing.assert_close
    close(found, wanted, rtol=tolerance, atol=tolerance)
    leaves = (problem.hidden, problem.weight)
    close(
        gradients_of(found, *leaves), gradients_of(wanted, *leaves), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize(("q", "gamma"), [(0.0, 0.0), (0.7, 2.0), (-1.0, 0.5), (2.0, 5.0)])
@pytest.mark.parametrize("chunk_tokens", [1, 3, None])
def test_value_and_gradients_equal_the_plain_loss(
    q: float, gamma: float, chunk_tokens: int | None
) -> None:
    problem = Problem()

    found = problem.fused(q, gamma, chunk_tokens=chunk_tokens)

    assert_same(problem, found, problem.plain(q, gamma), 1e-12)


def test_two_classes_by_hand() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [3.0]]).log1p().requires_grad_()  # logits 0 and ln 4

    loss_sum, log_probs = fused_flexible_loss(
        hidden, OutputLayer(weight), torch.tensor([1]), torch.tensor([5.0]), q=1.0, gamma=0.0
    )
    loss_sum.backward()  # type: ignore[no-untyped-call]

    # p = 4/5: the loss is 5 · (1 - p), its slope by log p is -5p, dz = ∓5p(1-p) = ∓0.8.
    assert loss_sum.item() == pytest.approx(1.0)
    assert log_probs.exp().item() == pytest.approx(0.8)
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([0.8, -0.8])
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(-0.8 * 1.3862944)


def test_gradients_agree_with_finite_differences() -> None:
    problem = Problem(tokens=4, width=3, vocabulary=6)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def total(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_flexible_loss(
            hidden,
            OutputLayer(weight, bias),
            problem.targets,
            problem.token_weights.double(),
            0.4,
            1.5,
            chunk_tokens=3,
        ).loss_sum

    assert torch.autograd.gradcheck(total, (problem.hidden, problem.weight, bias))


def test_float32_is_as_exact_as_the_plain_loss() -> None:
    problem, exact = Problem(64, 32, 501, torch.float32), Problem(64, 32, 501)

    found = gradients_of(problem.fused(chunk_tokens=10), problem.hidden, problem.weight)
    plain = gradients_of(problem.plain(), problem.hidden, problem.weight)

    truth = gradients_of(exact.plain(), exact.hidden, exact.weight)
    for own, other, true in zip(found, plain, truth, strict=True):
        assert distance(own, true) < max(2 * distance(other, true), 1e-6)


def test_bfloat16_is_as_exact_as_the_plain_loss() -> None:
    problem = Problem(300, 32, 501, torch.bfloat16)
    exact = Problem(300, 32, 501)
    with torch.no_grad():
        exact.hidden.copy_(problem.hidden)
        exact.weight.copy_(problem.weight)

    found = gradients_of(problem.fused(chunk_tokens=70), problem.hidden, problem.weight)
    plain = gradients_of(problem.plain(), problem.hidden, problem.weight)

    truth = gradients_of(exact.plain(), exact.hidden, exact.weight)
    for own, other, true in zip(found, plain, truth, strict=True):
        assert own.dtype == torch.bfloat16
        assert distance(other, true) < 0.02
        assert distance(own, true) < 1.2 * distance(other, true)


def distance(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def test_sums_over_chunks_of_bfloat16_are_float32() -> None:
    # 1 + 600 · 2^-9 needs more digits than bfloat16's: added one by one they would stay 1.
    tokens = 601
    hidden = torch.full((tokens, 1), 1.0, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    token_weights = torch.full((tokens,), 2.0**-8)
    token_weights[0] = 2.0

    loss_sum = fused_flexible_loss(
        hidden,
        OutputLayer(weight),
        torch.zeros(tokens).long(),
        token_weights,
        0.0,
        0.0,
        chunk_tokens=1,
    ).loss_sum
    loss_sum.backward()  # type: ignore[no-untyped-call]

    assert weight.grad is not None
    assert weight.grad[1].item() == pytest.approx(1 + 600 / 512, rel=2.0**-8)


def test_log_probs_of_bfloat16_logits_are_as_exact_as_float32() -> None:
    # Logits 127, 0.5 and 0: their differences have more digits than bfloat16.
    hidden = torch.ones(2, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[127.0], [0.5], [0.0]], dtype=torch.bfloat16)

    log_probs = fused_flexible_loss(
        hidden, OutputLayer(weight), torch.tensor([1, 2]), torch.ones(2), 0.0, 0.0
    ).log_probs

    assert log_probs.tolist() == [-126.5, -127.0]


@pytest.mark.parametrize("vocabulary", [2, 1001])
def test_any_vocabulary_and_a_short_last_chunk(vocabulary: int) -> None:
    problem = Problem(tokens=10, vocabulary=vocabulary)

    assert_same(problem, problem.fused(chunk_tokens=4), problem.plain(), 1e-12)


def test_parameters_may_differ_by_token() -> None:
    problem = Problem()
    q = torch.linspace(-1.0, 2.0, 7)
    gamma = torch.linspace(5.0, 0.0, 7)
    problem.token_weights[2] = 0.0

    found = problem.fused(q, gamma, chunk_tokens=2)

    assert_same(problem, found, problem.plain(q, gamma), 1e-6)


def test_tokens_of_weight_zero_are_never_read() -> None:
    problem = Problem()
    problem.token_weights[[0, 4]] = 0.0
    wanted = problem.plain()
    gradients = gradients_of(wanted, problem.hidden, problem.weight)
    with torch.no_grad():
        problem.hidden[[0, 4]] = torch.nan
    problem.targets[[0, 4]] = -100

    found = problem.fused(chunk_tokens=3)

    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients_of(found, problem.hidden, problem.weight), gradients, rtol=1e-12, atol=1e-12
    )


def test_the_caller_may_say_which_rows_have_a_weight() -> None:
    problem = Problem()
    problem.token_weights[3] = 0.0

    found = problem.fused(kept=weighted_rows(problem.token_weights))

    assert_same(problem, found, problem.plain(), 1e-12)


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_learn_is_zero_with_zero_gradients(tokens: int) -> None:
    problem = Problem(tokens=tokens)
    problem.token_weights.zero_()

    found = problem.fused()

    assert found.loss_sum.item() == 0.0
    assert found.log_probs.tolist() == [0.0] * tokens
    for gradient in gradients_of(found, problem.hidden, problem.weight):
        assert not gradient.any()


def test_a_matrix_tied_to_the_embeddings_gets_both_gradients() -> None:
    problem = Problem(tokens=6, vocabulary=9)
    ids = torch.tensor([1, 1, 4, 8, 0, 3])

    def gradient(fused: bool) -> Tensor:
        problem.hidden = torch.tanh(problem.weight[ids])
        loss = problem.fused(chunk_tokens=4) if fused else problem.plain()
        return gradients_of(loss, problem.weight)[0]

    torch.testing.assert_close(gradient(fused=True), gradient(fused=False), rtol=1e-12, atol=1e-12)


def test_a_retained_graph_gives_the_same_gradient_again() -> None:
    problem = Problem()
    loss_sum = problem.fused(chunk_tokens=3).loss_sum
    leaves = (problem.hidden, problem.weight)

    first = torch.autograd.grad(loss_sum, leaves, retain_graph=True)
    second = torch.autograd.grad(2.0 * loss_sum, leaves, retain_graph=True)
    third = torch.autograd.grad(loss_sum, leaves)

    for one, two, three in zip(first, second, third, strict=True):
        torch.testing.assert_close(two, 2.0 * one)
        torch.testing.assert_close(three, one)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss_sum, leaves)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    problem = Problem()
    getattr(problem, frozen).requires_grad_(False)
    (leaf,) = [one for one in (problem.hidden, problem.weight) if one.requires_grad]

    found, wanted = problem.fused(chunk_tokens=2), problem.plain()

    torch.testing.assert_close(gradients_of(found, leaf), gradients_of(wanted, leaf))


def test_without_gradients_only_the_value_is_computed() -> None:
    problem = Problem()

    with torch.no_grad():
        found = problem.fused(chunk_tokens=3)

    assert not found.loss_sum.requires_grad
    assert not problem.fused().log_probs.requires_grad
    torch.testing.assert_close(found.loss_sum, problem.plain().loss_sum.detach())


def test_bias_counts_and_gets_its_gradient() -> None:
    problem = Problem()
    bias = torch.linspace(-1.0, 1.0, 11, dtype=torch.float64, requires_grad=True)

    found, wanted = problem.fused(0.7, 2.0, bias, chunk_tokens=3), problem.plain(bias=bias)

    leaves = (problem.hidden, problem.weight, bias)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients_of(found, *leaves), gradients_of(wanted, *leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_trained_rows_stand_in_for_the_matrix_s(dtype: torch.dtype) -> None:
    problem = Problem(dtype=dtype)
    ids = torch.tensor([9, 0, 4])
    values = torch.randn(3, 5, dtype=torch.float64).to(dtype).requires_grad_()
    problem.targets[:3] = torch.tensor([0, 9, 1])
    whole = Problem(dtype=dtype)
    whole.hidden, whole.targets = problem.hidden, problem.targets
    whole.weight = problem.weight.index_copy(0, ids, values)

    found = problem.fused(0.7, 2.0, None, TrainedRows(ids, values), chunk_tokens=2)

    leaves = (problem.hidden, problem.weight, values)
    tolerance = 1e-12 if dtype == torch.float64 else 0.03
    wanted = gradients_of(whole.plain(), *leaves)
    for own, other in zip(gradients_of(found, *leaves), wanted, strict=True):
        assert distance(own, other.double()) < tolerance


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    problem = Problem(40, 16, 201, torch.float32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = problem.fused(chunk_tokens=9), problem.plain()
    exact = problem.plain()

    leaves = (problem.hidden, problem.weight)
    assert found.loss_sum.dtype == torch.float32
    torch.testing.assert_close(found.loss_sum, wanted.loss_sum, rtol=1e-5, atol=0.0)
    for own, other, true in zip(
        gradients_of(found, *leaves), gradients_of(wanted, *leaves), gradients_of(exact, *leaves),
        strict=True,
    ):  # fmt: skip
        assert own.dtype == torch.float32
        assert distance(own, true.double()) < 1.2 * distance(other, true.double()) < 0.02


def test_extreme_logits_stay_finite() -> None:
    problem = Problem(dtype=torch.float32)
    with torch.no_grad():
        problem.weight *= 1e4

    found = problem.fused(0.0, 5.0)

    assert found.loss_sum.isfinite()
    for gradient in gradients_of(found, problem.hidden, problem.weight):
        assert gradient.isfinite().all()


def test_a_certain_token_has_no_gradient() -> None:
    hidden = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])

    layer = OutputLayer(weight)
    found = fused_flexible_loss(hidden, layer, torch.tensor([0]), torch.ones(1), 0.0, 0.5)

    assert found.loss_sum.item() == 0.0
    assert gradients_of(found, hidden)[0].item() == 0.0


MATRIX = torch.ones(11, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.ones(7, 4)}, r"hidden must be \[N, H\]"),
        ({"hidden": torch.ones(1, 7, 5)}, r"hidden must be \[N, H\]"),
        ({"targets": torch.zeros(6).long()}, r"targets must be \[7\], one per token, not \[6\]"),
        ({"token_weights": torch.ones(7, 1)}, r"token_weights must be \[7\]"),
        ({"q": torch.ones(3)}, r"q must be \[7\], one per token, not \[3\]"),
        ({"gamma": torch.ones(7, requires_grad=True)}, "gamma gets no gradient"),
        ({"targets": torch.full((7,), 11)}, "target 11 has a weight and is outside .* of 11"),
        ({"targets": torch.full((7,), -100)}, "target -100 has a weight"),
        ({"layer": OutputLayer(MATRIX.bfloat16())}, "outside autocast they must agree"),
        ({"hidden": torch.ones(7, 5).half(), "layer": OutputLayer(MATRIX.half())}, "use bfloat16"),
        ({"layer": OutputLayer(MATRIX, torch.ones(3))}, r"bias must be \[11\], not \[3\]"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, not 0"),
        ({"q": float("nan")}, "q must be finite"),
        ({"gamma": -1.0}, "gamma must be finite and at least 0"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.ones(7, 5),
        "layer": OutputLayer(MATRIX),
        "targets": torch.zeros(7).long(),
        "token_weights": torch.ones(7),
        "q": 0.0,
        "gamma": 0.0,
    } | change

    with pytest.raises(ValueError, match=message):
        fused_flexible_loss(**arguments)
