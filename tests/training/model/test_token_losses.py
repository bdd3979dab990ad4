"""Which loss a token gets: by its id, by its category, by the progress of the training."""

import pytest
import torch

from loss.flexible import flexible_loss
from training.config.loss import DecisionLoss, GammaSchedule, LossConfig, QSchedule, TextLoss
from training.model.token_losses import TokenLosses

# Not in the order of their ids.
CONTROL_IDS = [90, 50, 70]
NAMES = ["safety", "unsupported", "respond"]
TARGETS = torch.tensor([[50, 3, -100, 90], [70, 91, 0, 50]])
LOG_PROBS = -torch.arange(1.0, 9.0).view(2, 4) / 4


def token_losses(decision: DecisionLoss, text: TextLoss | None = None) -> TokenLosses:
    config = LossConfig(decision=decision, text=TextLoss() if text is None else text)
    return TokenLosses(config, CONTROL_IDS, NAMES)


def test_cross_entropy_everywhere_is_two_numbers() -> None:
    losses = token_losses(DecisionLoss())
    assert losses.parameters(TARGETS, 0.5) == (0.0, 0.0)
    assert flexible_loss(LOG_PROBS, *losses.parameters(TARGETS, 0.5)).equal(-LOG_PROBS)


def test_decision_tokens_are_known_by_their_ids() -> None:
    found = token_losses(DecisionLoss()).is_decision(TARGETS)
    assert found.tolist() == [[True, False, False, True], [True, False, False, True]]
    column = TARGETS.T  # not contiguous
    assert token_losses(DecisionLoss()).is_decision(column).equal(found.T)


def test_decision_and_text_have_settings_of_their_own() -> None:
    losses = token_losses(DecisionLoss(q=0.7, gamma=1.0), TextLoss(q=0.25, gamma=1.0))
    q, gamma = losses.parameters(TARGETS, 0.0)
    assert gamma == 1.0
    assert isinstance(q, torch.Tensor)
    torch.testing.assert_close(
        q, torch.tensor([[0.7, 0.25, 0.25, 0.7], [0.7, 0.25, 0.25, 0.7]]), rtol=0, atol=1e-7
    )


def test_each_category_gets_its_own_and_the_unnamed_0() -> None:
    losses = token_losses(
        DecisionLoss(q={"safety": 0.5, "respond": -0.5}, gamma={"unsupported": 2.0}),
        TextLoss(q=0.125),
    )
    q, gamma = losses.parameters(TARGETS, 0.0)
    assert isinstance(q, torch.Tensor)
    assert isinstance(gamma, torch.Tensor)
    assert q.tolist() == [[0.0, 0.125, 0.125, 0.5], [-0.5, 0.125, 0.125, 0.0]]
    assert gamma.tolist() == [[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
    got = flexible_loss(LOG_PROBS, *losses.parameters(TARGETS, 0.0))
    for row in range(2):
        for at in range(4):
            alone = flexible_loss(LOG_PROBS[row, at], q[row, at].item(), gamma[row, at].item())
            torch.testing.assert_close(got[row, at], alone)


def test_schedules_move_with_the_training() -> None:
    losses = token_losses(
        DecisionLoss(q=QSchedule(start=0.0, end=1.0, over=0.5), gamma=1.0),
        TextLoss(gamma=GammaSchedule(start=4.0, end=0.0)),
    )
    decisions = torch.tensor([90, 50])
    text = torch.tensor([1, 2])
    for progress, q, gamma in ((0.0, 0.0, 4.0), (0.25, 0.5, 3.0), (0.5, 1.0, 2.0), (1.0, 1.0, 0.0)):
        ours = flexible_loss(torch.tensor([-1.0, -2.0]), *losses.parameters(decisions, progress))
        torch.testing.assert_close(ours, flexible_loss(torch.tensor([-1.0, -2.0]), q, 1.0))
        ours = flexible_loss(torch.tensor([-1.0, -2.0]), *losses.parameters(text, progress))
        torch.testing.assert_close(ours, flexible_loss(torch.tensor([-1.0, -2.0]), 0.0, gamma))


def test_a_schedule_beside_categories() -> None:
    losses = token_losses(
        DecisionLoss(q={"safety": 1.0}), TextLoss(q=QSchedule(start=0.0, end=0.5))
    )
    q, _ = losses.parameters(TARGETS, 0.5)
    assert isinstance(q, torch.Tensor)
    assert q.tolist() == [[0.0, 0.25, 0.25, 1.0], [0.0, 0.25, 0.25, 0.0]]


def test_gradients_are_those_of_each_token_alone() -> None:
    losses = token_losses(DecisionLoss(q={"safety": 0.7}, gamma=0.5))
    together = LOG_PROBS.clone().requires_grad_()
    torch.autograd.backward(flexible_loss(together, *losses.parameters(TARGETS, 0.0)).sum())
    alone = LOG_PROBS.clone().requires_grad_()
    q, gamma = losses.parameters(TARGETS, 0.0)
    torch.autograd.backward(flexible_loss(alone, q, gamma).sum())
    torch.testing.assert_close(together.grad, alone.grad)
    assert together.grad is not None
    # Safety: d/dlog p of (1-p)^.5 (1-p^.7)/.7 at log p = -1, by hand: -.5 p (1-p)^-.5 (1-p^.7)/.7
    # - (1-p)^.5 p^.7 = -.5·.36788/.79506·.71916 - .79506·.49659 = -.16638 - .39481.
    assert together.grad[0, 3].item() == pytest.approx(-0.56119, abs=2e-5)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"loss\.decision\.q is still 'auto'"):
        token_losses(DecisionLoss(q="auto"))
    with pytest.raises(ValueError, match=r"decision\.gamma names 'saftey', .* safety, unsupp"):
        token_losses(DecisionLoss(gamma={"saftey": 1.0}))
    with pytest.raises(ValueError, match="one id and one name of its own"):
        TokenLosses(LossConfig(), CONTROL_IDS, NAMES[:2])
    with pytest.raises(ValueError, match="one id and one name of its own"):
        TokenLosses(LossConfig(), [90, 90, 70], NAMES)
    with pytest.raises(ValueError, match="one id and one name of its own"):
        TokenLosses(LossConfig(), CONTROL_IDS, ["respond", "safety", "respond"])
    with pytest.raises(ValueError, match=r"progress must be 0 to 1, not 1\.5"):
        token_losses(DecisionLoss(q=QSchedule(start=0, end=1))).parameters(TARGETS, 1.5)
