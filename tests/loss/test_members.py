"""The exact members against textbook losses on logits, which share no code with the family."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from loss import members
from loss.flexible import flexible_loss

Loss = Callable[[Tensor, Tensor], Tensor]


def chosen(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(-1)[torch.arange(len(labels)), labels]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def focal(gamma: float) -> Loss:
    return lambda z, y: -((1 - chosen(z, y)) ** gamma) * chosen(z, y).log()


def half_absolute(logits: Tensor, labels: Tensor) -> Tensor:
    target = functional.one_hot(labels, logits.shape[-1])
    return functional.l1_loss(logits.softmax(-1), target.double(), reduction="none").sum(-1) / 2


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    return ((logits[:, 1] - logits[:, 0]).sigmoid() - labels) ** 2


def generalised(q: float) -> Loss:
    return lambda z, y: (1 - chosen(z, y) ** q) / q


def exponential(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.exp((logits[:, 0] - logits[:, 1]) * (2 * labels - 1))


@pytest.mark.parametrize(
    ("textbook", "member", "classes"),
    [
        pytest.param(cross_entropy, members.CROSS_ENTROPY, 7, id="cross-entropy"),
        pytest.param(focal(0.5), members.focal(0.5), 7, id="focal 0.5"),
        pytest.param(focal(2.0), members.focal(2.0), 7, id="focal 2"),
        pytest.param(half_absolute, members.HALF_ABSOLUTE, 7, id="half MAE"),
        pytest.param(brier, members.QUADRATIC, 2, id="two-class Brier"),
        pytest.param(generalised(0.7), members.generalised_cross_entropy(0.7), 7, id="GCE 0.7"),
        pytest.param(exponential, members.EXPONENTIAL, 2, id="exponential"),
    ],
)
def test_member_equals_its_textbook(textbook: Loss, member: members.Member, classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (500,), generator=generator)
    book, ours = (logits.clone().requires_grad_() for _ in range(2))
    expected = textbook(book, labels)
    log_probs = ours.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
    got = flexible_loss(log_probs, *member)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.autograd.backward(expected.sum())
    torch.autograd.backward(got.sum())
    torch.testing.assert_close(ours.grad, book.grad, rtol=1e-11, atol=1e-12)
