"""The flexible loss (1-p)^gamma · (1-p^q)/q, where p is the probability of the true class.

The name is ours. The family is assembled from published losses (see `loss.members`); it does not
claim to be any one published "flexible" loss.
"""

import math

import torch
from torch import Tensor

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
    """Keeps log_p (and so the loss) constant where the loss would leave the dtype's range."""
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
