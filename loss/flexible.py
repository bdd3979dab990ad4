"""The flexible loss (1-p)^gamma · (1-p^q)/q, where p is the probability of the true class.

The name is ours. The family is assembled from published losses (see `loss.members`); it does not
claim to be any one published "flexible" loss.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Reduction = Literal["none", "mean", "sum"]

# 1/(k+1)!: for |z| <= 1 the series of (e^z-1)/z and of its first two derivatives is exact to the
# dtype with 19 terms in float64 and 12 in float32.
_SERIES = tuple(1.0 / math.factorial(k + 1) for k in range(19))
_TERMS = {torch.float32: 12, torch.float64: 19}
# log p below this counts as this. No real log-probability is there, -inf is.
_LOWEST_LOG_PROB = -1e30
# Keeps exp() one rounding of its argument away from infinity.
_HEADROOM = 1.0 / 64


def flexible_loss(log_probs: Tensor, q: float | Tensor, gamma: float | Tensor) -> Tensor:
    """Returns (1-p)^gamma · (1-p^q)/q for each p = exp(log_probs); for q = 0 its limit, -log p.

    Differentiable twice in `log_probs`, and in `q` and `gamma` where they are tensors that ask for
    it. Value and both derivatives keep the dtype's precision, but for the factor |q·log p| that any
    exponential of a rounded argument has, and gamma counts as it is rounded in gamma + 1 (visible
    in float32 only in the second derivative near p = 1, for gamma below about 0.01).

    Where the truth is out of reach of the dtype:

    * q < 0 and p^q/|q| beyond the largest number (float32: q = -1, log p < -88.7): the loss stays
      at the largest value, within 2 %, and its derivatives are 0. The same for log p < -1e30.
    * p = 1 and 0 < gamma < 1: the second derivative is infinite there, 0 is returned. A log p
      above minus the smallest normal number counts as p = 1.
    * log p > 0, a rounding error: counts as p = 1, with derivative 0.

    Args:
        log_probs: Log-probability of the true class, any shape, floating point, at most 0.
        q: Number or tensor that broadcasts to `log_probs` (`[B, 1]` for a row each of `[B, T]`).
            Meant for -1 to 2. At 0 unbounded as cross-entropy; towards 1 ever more tolerant of
            wrong labels.
        gamma: Number or tensor as `q`, at least 0; meant for up to 5. Above 0 what is already right
            weighs less. A tensor's values are not checked here: that would stall a GPU.

    Returns:
        The loss, shaped as `log_probs`. float64 for float64, else float32: bfloat16 and float16
        are widened, since sums over tokens need it.

    Raises:
        ValueError: log_probs not floating point, a negative or non-finite number, or a shape that
            would widen `log_probs`.

    Source:
        (1-p^q)/q: arXiv 1805.07836 and, as alpha-loss, 1906.02314. (1-p)^gamma: arXiv 1708.02002.
    """
    log_p, q, gamma = _widened(log_probs, q, gamma)
    log_p = _within_range(log_p, q)

    tiny = torch.finfo(log_p.dtype).tiny
    near = (log_p > -0.5) & ((q * log_p).abs() < 1.0)
    # (1-p)^gamma has no derivative there, and the loss is 0.
    certain = (log_p > -tiny) & (gamma > 0.0) & (gamma < 1.0)
    near_loss = _loss_near_one(torch.where(near & ~certain, log_p, -0.25), q, gamma)
    far_loss = _loss_away_from_one(torch.where(near, -1.0, log_p), q, gamma)
    return torch.where(certain, 0.0, torch.where(near, near_loss, far_loss))


def flexible_loss_and_slope(
    log_probs: Tensor, q: float | Tensor, gamma: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Returns `flexible_loss` and its derivative by `log_probs`, neither with a graph.

    Arguments, ranges, dtypes and errors are `flexible_loss`'s, but for 0 < gamma < 1 the derivative
    is not cut off at 0 next to p = 1. A sixth of the operations of value and backward pass: what is
    not differentiated again may be a quotient.

    Returns:
        Loss and derivative, both shaped as `log_probs`.
    """
    given, q, gamma = _widened(log_probs.detach(), q, gamma)
    q, gamma = q.detach(), gamma.detach()
    log_p = _within_range(given, q)
    p = log_p.exp()
    rest, tail = _exponential_quotient(log_p), _exponential_quotient(q * log_p)
    weight = torch.pow(-log_p * rest, gamma)
    slope = -weight * (torch.exp(q * log_p) + gamma * p * tail / rest)
    return weight * -log_p * tail, torch.where((log_p < given) | (log_p > given), 0.0, slope)


def _exponential_quotient(z: Tensor) -> Tensor:
    """(e^z - 1)/z, 1 at 0."""
    return torch.where(z == 0.0, 1.0, torch.expm1(z) / z)


def _loss_near_one(log_p: Tensor, q: Tensor, gamma: Tensor) -> Tensor:
    """With x = -log p: x^(gamma+1) · ((1-p)/x)^gamma · (1-p^q)/(qx), near p = 1.

    Needs |log_p| and |q·log_p| below 1. One power holds all that vanishes at p = 1: no infinite
    factor meets a zero.
    """
    return (
        torch.pow(-log_p, gamma + 1.0)
        * torch.pow(_series(log_p), gamma)
        * _series(_where_near(q * log_p))
    )


def _loss_away_from_one(log_p: Tensor, q: Tensor, gamma: Tensor) -> Tensor:
    """The formula as it stands, needs 1-p well above 0.

    Not expm1: its derivative is computed as expm1(z) + 1, which is 0 long before e^z is.
    """
    z = q * log_p
    direct = z.abs() >= 1.0
    tail = (1.0 - torch.exp(torch.where(direct, z, -1.0))) / torch.where(direct, q, 1.0)
    series = -log_p * _series(_where_near(z))
    # There 1-p is 1 to the last digit, and gamma · tail could overflow in the backward pass.
    unweighted = z > _largest_exponent(z.dtype) / 2
    rest = 1.0 - torch.exp(torch.where(unweighted, -1.0, log_p))
    weight = torch.where(unweighted, 1.0, torch.pow(rest, gamma))
    return weight * torch.where(direct, tail, series)


def _largest_exponent(dtype: torch.dtype) -> float:
    """The largest z whose exp() is well inside the dtype."""
    return math.log(torch.finfo(dtype).max) - _HEADROOM


def _where_near(z: Tensor) -> Tensor:
    """Keeps what the series serves, and numbers that overflow in it out of the backward pass."""
    return torch.where(z.abs() < 1.0, z, 0.0)


def _series(z: Tensor) -> Tensor:
    """(e^z - 1)/z for |z| <= 1. The quotient itself loses half the digits in each derivative."""
    *lower, highest = _SERIES[: _TERMS[z.dtype]]
    total = torch.full_like(z, highest)
    for coefficient in reversed(lower):
        total = total * z + coefficient
    return total


def _within_range(log_p: Tensor, q: Tensor) -> Tensor:
    """Holds log_p (and so the loss) constant where the loss would leave the dtype's range."""
    q = q.detach()
    size = torch.where(q < 0.0, -q, 1.0)
    # The loss is p^q/|q| there, its second derivative |q|·p^q.
    reach = (_largest_exponent(log_p.dtype) - size.log().abs()).clamp(min=1.0)
    lowest = torch.where(q < 0.0, -reach / size, _LOWEST_LOG_PROB).clamp(min=_LOWEST_LOG_PROB)
    log_p = torch.where(log_p < lowest, lowest, log_p)
    return torch.where(log_p > 0.0, 0.0, log_p)


def _widened(
    log_probs: Tensor, q: float | Tensor, gamma: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, and returns all three as tensors of the dtype that is computed in."""
    if not log_probs.is_floating_point():
        raise ValueError(f"log_probs must be floating point, not {log_probs.dtype}")
    _check_number("q", q, least=-math.inf)
    _check_number("gamma", gamma, least=0.0)
    log_p = log_probs.to(torch.float64 if log_probs.dtype == torch.float64 else torch.float32)
    return log_p, _as_parameter("q", q, log_p), _as_parameter("gamma", gamma, log_p)


def _as_parameter(name: str, value: float | Tensor, log_p: Tensor) -> Tensor:
    """A tensor in log_p's dtype, checked not to widen it."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=log_p.dtype, device=log_p.device)
    trailing = log_p.shape[max(log_p.dim() - value.dim(), 0) :]
    fits = value.dim() <= log_p.dim() and all(
        own in (1, other) for own, other in zip(value.shape, trailing, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} of shape {list(value.shape)} does not broadcast to log_probs "
            f"{list(log_p.shape)}; one value a row is shape [rows, 1]"
        )
    return value.to(log_p)


def _check_number(name: str, value: float | Tensor, least: float) -> None:
    if not isinstance(value, Tensor) and not (math.isfinite(value) and value >= least):
        bound = "finite" if least == -math.inf else f"finite and at least {least:g}"
        raise ValueError(f"{name} must be {bound}, not {value}")


class FlexibleLoss(nn.Module):
    """`flexible_loss` with its parameters, a mask, weights and a reduction.

    A number stays a Python float. A tensor, one value per category, is a buffer and moves with the
    module; keep it in float32, a module cast to bfloat16 rounds q = 0.7 to 0.699.

    Attributes:
        q: Number or `[categories]`.
        gamma: Number or `[categories]`.
        reduction: "none", "mean" (by token count or weights) or "sum".
    """

    q: float | Tensor
    gamma: float | Tensor

    def __init__(
        self, q: float | Tensor = 0.0, gamma: float | Tensor = 0.0, reduction: Reduction = "mean"
    ) -> None:
        """Holds the parameters.

        Args:
            q: See `flexible_loss`; a tensor `[categories]` is chosen from by `category`.
            gamma: As `q`, at least 0.
            reduction: What `forward` returns.

        Raises:
            ValueError: A parameter out of range or of another shape, or an unknown reduction.
        """
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be 'none', 'mean' or 'sum', not {reduction!r}")
        self.reduction = reduction
        self._hold("q", q, least=-math.inf)
        self._hold("gamma", gamma, least=0.0)

    def forward(
        self,
        log_probs: Tensor,
        mask: Tensor | None = None,
        *,
        category: Tensor | None = None,
        weights: Tensor | None = None,
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Returns the loss of the tokens that mask and weights keep.

        Args:
            log_probs: Log-probabilities of the true tokens, any shape, for instance `[B, T]`.
            mask: Bool, shaped as `log_probs`: True counts. What is masked has no value, no
                gradient and may be -inf or NaN. None keeps all.
            category: Integer index into the per-category parameters, broadcasts to `log_probs`
                (`[B, 1]` for a category a row). Required with them, an error without.
            weights: Floating point, not negative, shaped as `log_probs`: what each loss is
                multiplied with. A weight of 0 masks. None weighs all alike, with 1.
            num_items: Only for "mean": the divisor instead of the sum of this call's own weights.
                With gradient accumulation: the weights (without weights: the tokens) of the whole
                step, so that the micro-batches' losses add up to the step's mean.

        Returns:
            "none": shaped as `log_probs`, 0 where masked. "mean": a scalar, the weighted sum over
            the sum of the weights. "sum": a scalar. 0 if nothing is kept. float64 for float64, else
            float32.

        Raises:
            ValueError: A mask or weights of another shape or dtype, `category` missing or
                superfluous, `num_items` with another reduction.
        """
        if num_items is not None and self.reduction != "mean":
            raise ValueError(f"num_items divides a 'mean', the reduction is {self.reduction!r}")
        kept, weights = _kept(log_probs, mask, weights)
        if kept is not None:
            log_probs = torch.where(kept, log_probs, 0.0)
        q, gamma = self._parameters_for(category)
        losses = flexible_loss(log_probs, q, gamma)
        if weights is not None:
            losses = losses * weights
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        if num_items is None:
            counted = weights if weights is not None else kept
            num_items = losses.numel() if counted is None else counted.sum()
        return losses.sum() / _divisor(num_items, losses)

    def extra_repr(self) -> str:
        """Returns what `repr` shows between the brackets."""
        return f"q={self.q}, gamma={self.gamma}, reduction={self.reduction!r}"

    def _parameters_for(self, category: Tensor | None) -> tuple[float | Tensor, float | Tensor]:
        per_category = isinstance(self.q, Tensor) or isinstance(self.gamma, Tensor)
        if per_category != (category is not None):
            state = "are per category" if per_category else "are plain numbers"
            given = "no category was given" if per_category else "a category was given"
            raise ValueError(f"q and gamma {state}, {given}")
        return _chosen(self.q, category), _chosen(self.gamma, category)

    def _hold(self, name: str, value: float | Tensor, least: float) -> None:
        if not isinstance(value, Tensor):
            _check_number(name, value, least)
            setattr(self, name, float(value))
            return
        if value.dim() != 1:
            raise ValueError(f"{name} must be a number or [categories], not {list(value.shape)}")
        for number in value.tolist():
            _check_number(name, number, least)
        self.register_buffer(name, value.detach().clone())


def _chosen(parameter: float | Tensor, category: Tensor | None) -> float | Tensor:
    if not isinstance(parameter, Tensor) or category is None:
        return parameter
    return parameter[category]


def _kept(
    log_probs: Tensor, mask: Tensor | None, weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Returns what counts (bool, None for all), and the weights, 0 where nothing counts."""
    if mask is not None:
        _check_like("mask", mask, log_probs, right=mask.dtype == torch.bool, kind="bool")
    if weights is None:
        return mask, None
    right = weights.is_floating_point()
    _check_like("weights", weights, log_probs, right=right, kind="floating point")
    kept = weights != 0.0 if mask is None else mask & (weights != 0.0)
    # Not in bfloat16: a sum of ones stops at 256 there.
    wide = torch.promote_types(weights.dtype, torch.float32)
    return kept, torch.where(kept, weights.to(wide), 0.0)


def _divisor(num_items: float | Tensor, losses: Tensor) -> float | Tensor:
    """Returns what the sum is divided by: 1 where nothing is kept, and the sum is 0."""
    if not isinstance(num_items, Tensor):
        return num_items if num_items > 0 else 1.0
    total = num_items.to(losses.device)
    return torch.where(total > 0, total, torch.ones_like(total))


def _check_like(name: str, given: Tensor, log_probs: Tensor, *, right: bool, kind: str) -> None:
    if not right or given.shape != log_probs.shape:
        raise ValueError(
            f"{name} must be {kind} and shaped as log_probs {list(log_probs.shape)}, "
            f"not {given.dtype} {list(given.shape)}"
        )
