"""FlexibleLoss: masks, reductions by token count, parameters by category."""

import math

import pytest
import torch

from loss import members
from loss.flexible import FlexibleLoss, flexible_loss

LOG_PROBS = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
MASK = torch.tensor([[True, False, True], [False, False, True]])


def test_reductions_by_hand() -> None:
    assert FlexibleLoss(reduction="sum")(LOG_PROBS).item() == 21
    assert FlexibleLoss()(LOG_PROBS).item() == 3.5
    assert FlexibleLoss(reduction="none")(LOG_PROBS).tolist() == [[1, 2, 3], [4, 5, 6]]


def test_mask_counts_only_what_it_keeps() -> None:
    assert FlexibleLoss(reduction="sum")(LOG_PROBS, MASK).item() == 10
    assert FlexibleLoss()(LOG_PROBS, MASK).item() == pytest.approx(10 / 3)
    assert FlexibleLoss(reduction="none")(LOG_PROBS, MASK).tolist() == [[1, 0, 3], [0, 0, 6]]


@pytest.mark.parametrize("padding", [math.nan, -math.inf, math.inf, -1.0])
@pytest.mark.parametrize(("q", "gamma"), [(-1.0, 0.5), (0.0, 0.0), (0.7, 2.0)])
def test_padding_reaches_neither_value_nor_gradient(q: float, gamma: float, padding: float) -> None:
    padded = LOG_PROBS.where(MASK, padding).requires_grad_()
    loss = FlexibleLoss(q, gamma)(padded, MASK)
    torch.autograd.backward(loss)
    kept = LOG_PROBS[MASK].requires_grad_()
    expected = flexible_loss(kept, q, gamma).mean()
    torch.autograd.backward(expected)
    torch.testing.assert_close(loss, expected)
    assert padded.grad is not None
    assert kept.grad is not None
    torch.testing.assert_close(padded.grad[MASK], kept.grad)
    assert not padded.grad[~MASK].any()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_masked_is_0_with_gradient_0(reduction: str) -> None:
    padded = torch.full((2, 3), math.nan, requires_grad=True)
    loss = FlexibleLoss(0.5, 0.5, reduction)(padded, torch.zeros(2, 3, dtype=torch.bool))  # type: ignore[arg-type]
    torch.autograd.backward(loss.sum())
    assert not loss.any()
    assert padded.grad is not None
    assert not padded.grad.any()


def test_no_tokens_at_all_is_0() -> None:
    assert FlexibleLoss()(torch.zeros(0, 4)).item() == 0


def test_micro_batches_of_unequal_length_add_up_to_the_whole_step() -> None:
    whole = LOG_PROBS.clone().requires_grad_()
    parts = LOG_PROBS.clone().requires_grad_()
    loss = FlexibleLoss(0.3, 1.5)
    expected = loss(whole, MASK)
    torch.autograd.backward(expected)
    count = MASK.sum()
    total = 0.0
    for row in range(2):
        part = loss(parts[row], MASK[row], num_items=count if row else int(count))
        torch.autograd.backward(part)
        total += part.item()
    assert total == pytest.approx(expected.item())
    torch.testing.assert_close(parts.grad, whole.grad)


def test_num_items_of_0_does_not_divide_by_it() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert FlexibleLoss()(LOG_PROBS, nothing, num_items=0).item() == 0
    assert FlexibleLoss()(LOG_PROBS, nothing, num_items=torch.tensor(0)).item() == 0


def test_bfloat16_is_summed_in_float32() -> None:
    # In bfloat16 the sum of ones stops at 256.
    loss = FlexibleLoss(reduction="sum")(-torch.ones(4096, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == 4096


def test_category_chooses_the_row_s_parameters() -> None:
    loss = FlexibleLoss(torch.tensor([0.0, 1.0, -1.0]), 0.5, "none")
    out = loss(LOG_PROBS, category=torch.tensor([[2], [1]]))
    assert out[0].equal(flexible_loss(LOG_PROBS[0], -1.0, 0.5))
    assert out[1].equal(flexible_loss(LOG_PROBS[1], 1.0, 0.5))


def test_per_category_values_are_saved_and_numbers_are_not() -> None:
    loss = FlexibleLoss(0.5, torch.tensor([0.0, 1.0]))
    assert list(loss.state_dict()) == ["gamma"]
    assert loss.q == 0.5
    assert "q=0.5" in repr(loss)


def test_members_are_its_arguments() -> None:
    loss = FlexibleLoss(*members.focal(2.0))
    assert (loss.q, loss.gamma) == (0.0, 2.0)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"reduction must be .* not 'average'"):
        FlexibleLoss(reduction="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gamma must be finite and at least 0"):
        FlexibleLoss(gamma=torch.tensor([0.0, -0.5]))
    with pytest.raises(ValueError, match=r"q must be a number or \[categories\], not \[1, 2\]"):
        FlexibleLoss(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no category was given"):
        FlexibleLoss(torch.zeros(2))(LOG_PROBS)
    with pytest.raises(ValueError, match="plain numbers, a category was given"):
        FlexibleLoss()(LOG_PROBS, category=torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_items divides a 'mean'"):
        FlexibleLoss(reduction="sum")(LOG_PROBS, num_items=3)
    with pytest.raises(ValueError, match=r"mask must be bool .* not torch.int64 \[2, 3\]"):
        FlexibleLoss()(LOG_PROBS, MASK.long())
    with pytest.raises(ValueError, match=r"\[2, 3\], not torch.bool \[3\]"):
        FlexibleLoss()(LOG_PROBS, MASK[0])


def test_weights_multiply_and_divide_by_hand() -> None:
    weights = torch.tensor([[2.0, 0.0, 0.5], [0.0, 4.0, 1.0]])
    # 1·2 + 3·0.5 + 5·4 + 6·1 = 29.5, the weights' sum is 7.5.
    assert FlexibleLoss(reduction="sum")(LOG_PROBS, weights=weights).item() == 29.5
    assert FlexibleLoss()(LOG_PROBS, weights=weights).item() == pytest.approx(29.5 / 7.5)
    each = FlexibleLoss(reduction="none")(LOG_PROBS, weights=weights)
    assert each.tolist() == [[2, 0, 1.5], [0, 20, 6]]
    # With the mask 1·2 + 3·0.5 + 6·1 = 9.5 over 3.5.
    assert FlexibleLoss()(LOG_PROBS, MASK, weights=weights).item() == pytest.approx(9.5 / 3.5)


def test_weights_below_1_in_sum_still_give_a_mean() -> None:
    loss = FlexibleLoss()(LOG_PROBS, weights=torch.full((2, 3), 0.01))
    assert loss.item() == pytest.approx(3.5)


@pytest.mark.parametrize("padding", [math.nan, -math.inf])
def test_a_weight_of_0_masks(padding: float) -> None:
    weights = MASK.float() * 3
    padded = LOG_PROBS.where(MASK, padding).requires_grad_()
    loss = FlexibleLoss(0.5, 0.5)(padded, weights=weights)
    torch.autograd.backward(loss)
    kept = LOG_PROBS[MASK].requires_grad_()
    expected = flexible_loss(kept, 0.5, 0.5).mean()
    torch.autograd.backward(expected)
    torch.testing.assert_close(loss, expected)
    assert padded.grad is not None
    assert kept.grad is not None
    torch.testing.assert_close(padded.grad[MASK], kept.grad)
    assert not padded.grad[~MASK].any()


def test_weights_of_0_only_give_0() -> None:
    padded = torch.full((2, 3), math.nan, requires_grad=True)
    loss = FlexibleLoss(0.5)(padded, weights=torch.zeros(2, 3))
    torch.autograd.backward(loss)
    assert loss.item() == 0
    assert padded.grad is not None
    assert not padded.grad.any()


def test_weighted_micro_batches_add_up_to_the_whole_step() -> None:
    weights = torch.tensor([[0.2, 0.1, 0.0], [3.0, 0.5, 10.0]])
    loss = FlexibleLoss(0.7, 1.0)
    whole = loss(LOG_PROBS, weights=weights).item()
    for total in (weights.sum(), weights.sum().item()):
        parts = [loss(LOG_PROBS[r], weights=weights[r], num_items=total).item() for r in range(2)]
        assert sum(parts) == pytest.approx(whole)


def test_bfloat16_weights_are_summed_in_float32() -> None:
    ones = torch.ones(4096, dtype=torch.bfloat16)
    assert FlexibleLoss()(-ones, weights=ones).item() == pytest.approx(1.0)


def test_wrong_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"weights must be floating point .* torch.int64 \[2, 3\]"):
        FlexibleLoss()(LOG_PROBS, weights=MASK.long())
    with pytest.raises(ValueError, match=r"weights must .* \[2, 3\], not torch.float32 \[3\]"):
        FlexibleLoss()(LOG_PROBS, weights=torch.ones(3))


def test_module_compiles_without_a_graph_break() -> None:
    loss = FlexibleLoss(torch.tensor([0.0, 0.7]), torch.tensor([2.0, 0.5]))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    weights = torch.tensor([[2.0, 0.0, 0.5], [0.0, 4.0, 1.0]])
    category = torch.tensor([[1], [0]])
    ours, plain = (LOG_PROBS.clone().requires_grad_() for _ in range(2))
    value = compiled(ours, MASK, category=category, weights=weights)
    expected = loss(plain, MASK, category=category, weights=weights)
    torch.testing.assert_close(value, expected)
    torch.autograd.backward(value)
    torch.autograd.backward(expected)
    torch.testing.assert_close(ours.grad, plain.grad)
