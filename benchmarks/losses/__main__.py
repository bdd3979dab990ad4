"""What the flexible loss contains exactly, and what it only comes near to: one table, one figure.

Every textbook loss below is written from its paper and shares no code with `loss`. Where a loss is
defined on a margin, or on all classes' probabilities, the view is that of two classes: margin m is
the true logit minus the other, p = 1/(1+exp(-m)).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

from loss import members
from loss.flexible import flexible_loss

Loss = Callable[[Tensor, Tensor], Tensor]
Curve = Callable[[Tensor], Tensor]

Q_RANGE = (-1.0, 2.0)
GAMMA_RANGE = (0.0, 5.0)
MARGINS = torch.linspace(-4.0, 4.0, 401, dtype=torch.float64)
PROBABILITIES = torch.linspace(0.01, 0.99, 401, dtype=torch.float64)


class Exact(NamedTuple):
    """A loss that the family contains.

    Attributes:
        textbook: Mean loss of logits `[N, classes]` and labels `[N]`.
        scale: The textbook's loss is this times the member's.
        classes: 10, or 2 where that is what the textbook defines.
        lr: Learning rate of both trainings.
    """

    textbook: Loss
    member: members.Member
    scale: float = 1.0
    classes: int = 10
    lr: float = 0.1


class Near(NamedTuple):
    """A loss that the family does not contain.

    Attributes:
        curve: Loss of margin, or of probability.
        on_margin: Which of the two.
    """

    curve: Curve
    on_margin: bool


class Fit(NamedTuple):
    """The member that is nearest to a curve by least squares.

    Attributes:
        scale: What it is multiplied with: as much as a learning rate.
        rms: Root mean square distance, in the curve's unit.
        relative: The same over the curve's own root mean square.
        largest: Largest distance.
    """

    q: float
    gamma: float
    scale: float
    rms: float
    relative: float
    largest: float


def true_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the softmax probability of each label, `[N]`."""
    return logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the true logit minus the other one, `[N]`, of two classes."""
    return (logits[:, 1] - logits[:, 0]) * (2 * labels - 1)


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Focal loss with gamma = 2, arXiv 1708.02002."""
    p = true_probability(logits, labels)
    return (-((1 - p) ** 2) * p.log()).mean()


def absolute(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean absolute error between one-hot target and probabilities, summed over the classes."""
    target = functional.one_hot(labels, logits.shape[-1])
    return (target - logits.softmax(-1)).abs().sum(-1).mean()


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the second class's probability."""
    return ((logits[:, 1] - logits[:, 0]).sigmoid() - labels).square().mean()


def generalised(logits: Tensor, labels: Tensor) -> Tensor:
    """Generalised cross-entropy with the paper's q = 0.7, arXiv 1805.07836."""
    return ((1 - true_probability(logits, labels) ** 0.7) / 0.7).mean()


def exponential(logits: Tensor, labels: Tensor) -> Tensor:
    """AdaBoost's loss."""
    return (-margins(logits, labels)).exp().mean()


EXACT = {
    "cross-entropy": Exact(functional.cross_entropy, members.CROSS_ENTROPY),
    "focal, gamma 2": Exact(focal, members.focal(2.0)),
    "MAE": Exact(absolute, members.HALF_ABSOLUTE, scale=2.0),
    "quadratic (Brier), two classes": Exact(brier, members.QUADRATIC, classes=2),
    "generalised cross-entropy, q 0.7": Exact(generalised, members.generalised_cross_entropy(0.7)),
    # Its gradient has no bound: at 0.1 the textbook's training ends in NaN.
    "exponential, two classes": Exact(exponential, members.EXPONENTIAL, classes=2, lr=0.005),
}


def softmax_squared(p: Tensor) -> Tensor:
    """Squared error between one-hot target and probabilities, summed over two classes."""
    return (1 - p) ** 2 + (0 - (1 - p)) ** 2


def softmax_squared_spread(p: Tensor) -> Tensor:
    """The same for ten classes where the wrong nine share alike what p leaves."""
    return (1 - p) ** 2 + 9 * ((1 - p) / 9) ** 2


def poly(epsilon: float) -> Curve:
    """PolyLoss-1, arXiv 2204.12511."""
    return lambda p: -p.log() + epsilon * (1 - p)


def tempered_exp(x: Tensor, t: float) -> Tensor:
    """The paper's exp_t for t above 1, x at most 0."""
    return (1 + (1 - t) * x) ** (1 / (1 - t))


def tempered_log(x: Tensor, t: float) -> Tensor:
    """The paper's log_t."""
    return (x ** (1 - t) - 1) / (1 - t)


def bi_tempered(m: Tensor, t1: float = 0.7, t2: float = 1.3) -> Tensor:
    """Bi-tempered logistic loss of two classes, arXiv 1906.03361; the normaliser by bisection."""
    logits = torch.stack([m, torch.zeros_like(m)], -1)
    logits = logits - logits.amax(-1, keepdim=True)
    low, high = torch.zeros(len(m), 1).double(), torch.full((len(m), 1), 50.0).double()
    for _ in range(100):
        middle = (low + high) / 2
        too_much = tempered_exp(logits - middle, t2).sum(-1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    probabilities = tempered_exp(logits - high, t2)
    return -tempered_log(probabilities[:, 0], t1) - (1 - (probabilities ** (2 - t1)).sum(-1)) / (
        2 - t1
    )


NEAR = {
    "hinge": Near(lambda m: (1 - m).clamp(min=0), on_margin=True),
    "squared hinge": Near(lambda m: (1 - m).clamp(min=0).square(), on_margin=True),
    "softmax-MSE, 2 classes": Near(softmax_squared, on_margin=False),
    "softmax-MSE, 10 classes, rest spread": Near(softmax_squared_spread, on_margin=False),
    "PolyLoss-1, epsilon 1": Near(poly(1.0), on_margin=False),
    "PolyLoss-1, epsilon -0.5": Near(poly(-0.5), on_margin=False),
    "bi-tempered, t1 0.7, t2 1.3": Near(bi_tempered, on_margin=True),
}


def member_loss(exact: Exact) -> Loss:
    """Returns the member as a mean over logits and labels."""

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        chosen = logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)
        return exact.scale * flexible_loss(chosen, *exact.member).mean()

    return mean


def differences(exact: Exact, dtype: torch.dtype, seed: int) -> tuple[float, float]:
    """Returns the largest differences in value and gradient over 4,096 rows of random logits.

    Relative to the larger of 1 and the textbook's number; one row at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4096, exact.classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(exact.classes, (4096,), generator=generator)
    results = []
    for loss in (exact.textbook, member_loss(exact)):
        x = logits.to(dtype).requires_grad_()
        rows = torch.vmap(lambda a, b, f=loss: f(a[None], b[None]))(x, labels)
        (gradient,) = torch.autograd.grad(rows.sum(), x)
        results.append((rows.detach(), gradient))
    (value, gradient), (own_value, own_gradient) = results
    return (
        float(((value - own_value).abs() / value.abs().clamp(min=1)).max()),
        float(((gradient - own_gradient).abs() / gradient.abs().clamp(min=1)).max()),
    )


class Run(NamedTuple):
    """One training.

    Attributes:
        losses: Batch loss of each step.
        accuracy: Test accuracy after each epoch.
    """

    losses: Tensor
    accuracy: Tensor


def train(loss: Loss, exact: Exact, dtype: torch.dtype, seed: int, epochs: int) -> Run:
    """Trains a 64-64-classes MLP on the digits (two classes: odd against even)."""
    classes = exact.classes
    features, digits = load_digits(return_X_y=True)
    labels = digits % 2 if classes == 2 else digits
    split = train_test_split(features / 16, labels, test_size=0.3, random_state=seed)
    x, x_test = (torch.tensor(part, dtype=dtype) for part in split[:2])
    y, y_test = (torch.tensor(part) for part in split[2:])
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=exact.lr, momentum=0.9)
    losses, accuracy = [], []
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x), 64):
            batch = order[start : start + 64]
            value = loss(model(x[batch]), y[batch])
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            losses.append(value.item())
        with torch.no_grad():
            accuracy.append((model(x_test).argmax(-1) == y_test).double().mean().item())
    return Run(torch.tensor(losses, dtype=torch.float64), torch.tensor(accuracy))


def nearest(near: Near) -> Fit:
    """Returns the nearest member: a grid over q and gamma, then Nelder-Mead from its best point."""
    points = MARGINS if near.on_margin else PROBABILITIES
    log_p = functional.logsigmoid(points) if near.on_margin else points.log()
    target = near.curve(points)

    def scaled(q: float, gamma: float) -> tuple[float, Tensor]:
        curve = flexible_loss(log_p, q, gamma)
        scale = float((target @ curve) / (curve @ curve))
        return scale, scale * curve - target

    def distance(place: Any) -> float:
        return float(scaled(float(place[0]), float(place[1]))[1].square().mean().sqrt())

    starts = ((q, g) for q in np.linspace(*Q_RANGE, 31) for g in np.linspace(*GAMMA_RANGE, 26))
    found = minimize(
        distance,
        min(starts, key=distance),
        method="Nelder-Mead",
        bounds=[Q_RANGE, GAMMA_RANGE],
        options={"xatol": 1e-6, "fatol": 1e-12},
    )
    q, gamma = (float(number) for number in found.x)
    scale, off = scaled(q, gamma)
    rms = distance(found.x)
    own = float(target.square().mean().sqrt())
    return Fit(q, gamma, scale, rms, rms / own, float(off.abs().max()))


def draw(fits: dict[str, Fit], path: Path) -> None:
    """Draws each curve and its nearest member; the last panel holds the exact members."""
    mpl.use("Agg")
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.5), layout="constrained")
    for axis, (name, fit) in zip(axes.flat, fits.items(), strict=False):
        near = NEAR[name]
        points = MARGINS if near.on_margin else PROBABILITIES
        log_p = functional.logsigmoid(points) if near.on_margin else points.log()
        axis.plot(points, near.curve(points), "k", label=name)
        ours = fit.scale * flexible_loss(log_p, fit.q, fit.gamma)
        label = f"{fit.scale:.3g} times (q {fit.q:.2f}, gamma {fit.gamma:.2f})"
        axis.plot(points, ours, "C1--", label=label)
        axis.set_title(f"{name}: {100 * fit.relative:.1f} % away", fontsize=10)
        axis.set_xlabel("margin" if near.on_margin else "probability of the true class")
        axis.legend(fontsize=8)
    last = axes.flat[-1]
    for name, exact in EXACT.items():
        curve = exact.scale * flexible_loss(PROBABILITIES.log(), *exact.member)
        last.plot(PROBABILITIES, curve, label=name)
    last.set(xlabel="probability of the true class", ylim=(0, 4))
    last.set_title("exact members", fontsize=10)
    last.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure_exact(console: Console, seeds: int, epochs: int) -> dict[str, dict[str, float]]:
    """Returns the differences of each exact member, the largest over the seeds."""
    precisions = {"float64": torch.float64, "float32": torch.float32}
    jobs = [(name, kind, seed) for name in EXACT for kind in precisions for seed in range(seeds)]
    results: dict[str, dict[str, float]] = {name: {} for name in EXACT}
    for name, kind, seed in track(jobs, "exact members", console=console):
        exact, dtype = EXACT[name], precisions[kind]
        value, gradient = differences(exact, dtype, seed)
        book = train(exact.textbook, exact, dtype, seed, epochs)
        ours = train(member_loss(exact), exact, dtype, seed, epochs)
        figures = {
            f"value_{kind}": value,
            f"gradient_{kind}": gradient,
            f"training_loss_{kind}": float((book.losses - ours.losses).abs().max()),
            f"test_accuracy_{kind}": float((book.accuracy - ours.accuracy).abs().max()),
        }
        for key, figure in figures.items():
            results[name][key] = max(figure, results[name].get(key, 0.0))
        accuracy = float(book.accuracy[-1])
        results[name]["lowest_accuracy"] = min(accuracy, results[name].get("lowest_accuracy", 1.0))
    return results


def as_markdown(exact: dict[str, dict[str, float]], near: dict[str, Fit], setting: str) -> str:
    """Returns both halves of the table."""
    columns = ("value", "gradient", "training_loss", "test_accuracy")
    heads = [f"{c.replace('_', ' ')}, {k}" for k in ("float64", "float32") for c in columns]
    lines = ["# The flexible loss and the losses that people know", "", setting, ""]
    lines += ["## Contained exactly: largest differences", ""]
    lines += [f"| loss | q | gamma | scale | {' | '.join(heads)} | lowest final accuracy |"]
    lines += ["|---" * 13 + "|"]
    for name, row in exact.items():
        place = EXACT[name]
        cells = [f"{row[f'{c}_{k}']:.1e}" for k in ("float64", "float32") for c in columns]
        where = f"{place.member.q:g} | {place.member.gamma:g} | {place.scale:g}"
        accuracy = f"{row['lowest_accuracy']:.3f}"
        lines.append(f"| {name} | {where} | {' | '.join(cells)} | {accuracy} |")
    lines += ["", "## Only near: the nearest member by least squares", ""]
    lines += ["| loss | over | q | gamma | scale | RMS | relative | largest |", "|---" * 8 + "|"]
    for name, fit in near.items():
        over = "margin -4 to 4" if NEAR[name].on_margin else "p 0.01 to 0.99"
        lines.append(
            f"| {name} | {over} | {fit.q:.3f} | {fit.gamma:.3f} | {fit.scale:.3f} "
            f"| {fit.rms:.2g} | {100 * fit.relative:.2g} % | {fit.largest:.2g} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    console = Console()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the model is too small for more
    exact = measure_exact(console, arguments.seeds, arguments.epochs)
    near = {name: nearest(NEAR[name]) for name in track(NEAR, "nearest", console=console)}
    setting = (
        "Digits MLP 64-64-k, SGD 0.1 (exponential 0.005), momentum 0.9, batch 64, "
        f"{arguments.epochs} epochs, seeds 0 to {arguments.seeds - 1}, torch {torch.__version__}. "
        "Differences of value and gradient are relative to the larger of 1 and the textbook's "
        "number, over 4,096 random rows."
    )
    table = as_markdown(exact, near, setting)
    (arguments.out / "losses.md").write_text(table)
    results = {
        "setting": setting,
        "exact": exact,
        "near": {name: fit._asdict() for name, fit in near.items()},
    }
    (arguments.out / "losses.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(near, arguments.out / "losses.png")
    console.print(table, soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    main()
