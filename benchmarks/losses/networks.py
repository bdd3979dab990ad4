"""Many small networks trained at once, as batched matrix products: seeds times candidates."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loss.flexible import flexible_loss
from loss.members import Member

HIDDEN = 32
BATCH = 64
TEST_EVERY = 5


class Candidate(NamedTuple):
    """What is tuned.

    Attributes:
        lr: Learning rate of Adam.
    """

    lr: float
    member: Member


class Samples(NamedTuple):
    """Rows of one table, for all seeds.

    Attributes:
        x: `[S, N, features]` fp32, standardised.
        y: `[S, N]` int64.
    """

    x: Tensor
    y: Tensor


class Trained(NamedTuple):
    """Networks at the end of their training.

    Attributes:
        logits: Of the rows to be scored, `[S, C, N, classes]`.
        curves: What was measured on those rows after every `TEST_EVERY` steps, `[S, C, points]`;
            or empty.
    """

    logits: Tensor
    curves: Tensor


class Networks:
    """Perceptrons with one hidden layer: C for each of S seeds, which begin alike within a seed.

    Args:
        hidden: Whether there is the hidden layer; otherwise they are linear, and begin at 0.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        candidates: Sequence[Sequence[Candidate]],
        features: int,
        classes: int,
        *,
        hidden: bool = True,
    ) -> None:
        s, c = len(candidates), len(candidates[0])
        rates = torch.tensor([[one.lr for one in row] for row in candidates])
        self.q = torch.tensor([[one.member.q for one in row] for row in candidates])[..., None]
        gamma = torch.tensor([[one.member.gamma for one in row] for row in candidates])
        self.gamma = gamma[..., None]
        if not hidden:
            self.parameters = [torch.zeros(s, c, features, classes), torch.zeros(s, c, 1, classes)]
            self.rates = [rates[:, :, None, None]] * 2
            return
        first = torch.stack([_normal(seed, features, HIDDEN) for seed in seeds])
        second = torch.stack([_normal(seed, HIDDEN, classes) for seed in seeds])
        # One wide first layer a seed: its candidates see the same rows.
        self.parameters = [
            first.repeat(1, 1, c),
            torch.zeros(s, 1, c * HIDDEN),
            second[:, None].repeat(1, c, 1, 1),
            torch.zeros(s, c, 1, classes),
        ]
        wide = rates.repeat_interleave(HIDDEN, 1)[:, None]
        self.rates = [wide, wide, rates[:, :, None, None], rates[:, :, None, None]]

    def logits(self, x: Tensor) -> Tensor:
        """Returns `[S, C, B, classes]` for `[S, B, features]`."""
        if len(self.parameters) == 2:
            weight, bias = self.parameters
            return torch.matmul(x[:, None], weight) + bias
        w1, b1, w2, b2 = self.parameters
        hidden = torch.baddbmm(b1, x, w1).relu().view(*x.shape[:2], w2.shape[1], HIDDEN)
        return torch.matmul(hidden.transpose(1, 2), w2) + b2

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns each network's mean loss, `[S, C]`."""
        log_probs = self.logits(x).log_softmax(-1)
        index = y[:, None, :, None].expand(-1, log_probs.shape[1], -1, -1)
        chosen = log_probs.gather(-1, index).squeeze(-1)
        return flexible_loss(chosen, self.q, self.gamma).mean(-1)


def _normal(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * math.sqrt(2 / rows)


class Adam:
    """Adam with a learning rate for each network."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._mean = [torch.zeros_like(p) for p in networks.parameters]
        self._square = [torch.zeros_like(p) for p in networks.parameters]
        self._steps = 0

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Moves every parameter."""
        self._steps += 1
        faster = 1 / (1 - 0.9**self._steps)
        flatter = 1 / (1 - 0.999**self._steps) ** 0.5
        for p, gradient, mean, square, rate in zip(
            self._networks.parameters,
            gradients,
            self._mean,
            self._square,
            self._networks.rates,
            strict=True,
        ):
            mean.lerp_(gradient, 0.1)
            square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            p.sub_(rate * (mean * faster).div_(square.sqrt().mul_(flatter).add_(1e-8)))


def train(
    candidates: Sequence[Sequence[Candidate]],
    rows: Samples,
    scored: Samples,
    classes: int,
    seeds: Sequence[int],
    steps: int,
    *,
    hidden: bool = True,
    measure: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Trained:
    """Trains C networks a seed; within a seed all begin alike and see the same batches.

    Args:
        candidates: `[S][C]`.
        hidden: As in `Networks`.
        measure: What is measured on the way, such as `accuracy`; None measures nothing.
    """
    networks = Networks(seeds, candidates, rows.x.shape[-1], classes, hidden=hidden)
    adam = Adam(networks)
    place = torch.arange(len(candidates))[:, None]
    curve = []
    batches = _batches(seeds, rows.x.shape[1], steps)
    for step in range(1, steps + 1):
        batch = batches[:, step - 1]
        for p in networks.parameters:
            p.requires_grad_(True)
        total = networks.losses(rows.x[place, batch], rows.y[place, batch]).sum()
        gradients = torch.autograd.grad(total, networks.parameters)
        with torch.no_grad():
            for p in networks.parameters:
                p.requires_grad_(False)
            adam.step(gradients)
            if measure and step % TEST_EVERY == 0:
                curve.append(measure(networks.logits(scored.x), scored.y))
    with torch.no_grad():
        points = torch.stack(curve, -1) if curve else torch.empty(0)
        return Trained(networks.logits(scored.x), points)


def _batches(seeds: Sequence[int], rows: int, steps: int) -> Tensor:
    """Returns the rows of each step, `[S, steps, B]`; every row once before any comes again."""
    size = min(BATCH, rows)
    passes = -(-steps * size // rows)
    orders = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed + 1_000_000)
        order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(passes)])
        orders.append(order[: steps * size].view(steps, size))
    return torch.stack(orders)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns `[S, C]` for logits `[S, C, N, classes]` and labels `[S, N]`."""
    return (logits.argmax(-1) == y[:, None]).double().mean(-1)


def ranking(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the area under the ROC curve of each class against the rest, averaged, `[S, C]`.

    A class that has no rows, or all, counts as 1/2.

    Args:
        logits: `[S, C, N, classes]`.
        y: `[S, N]`.
    """
    areas = []
    for label in range(logits.shape[-1]):
        others = torch.cat([logits[..., :label], logits[..., label + 1 :]], -1).logsumexp(-1)
        # Log-odds: probabilities tie at 1 long before these do.
        place = (logits[..., label] - others).argsort(-1).argsort(-1).double() + 1
        positive = (y == label)[:, None].double()
        count = positive.sum(-1)
        rest = y.shape[-1] - count
        above = (place * positive).sum(-1) - count * (count + 1) / 2
        area = above / (count * rest).clamp(min=1)
        areas.append(torch.where(count * rest > 0, area, torch.full_like(area, 0.5)))
    return torch.stack(areas).mean(0)
