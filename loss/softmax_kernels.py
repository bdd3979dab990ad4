"""Softmax of a chunk of logits and its gradient in place, on a GPU: two passes over the logits.

The same in torch operations takes six passes and a float32 copy.

Source:
    Online softmax: arXiv 1805.02867.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 16
# Float32's lowest number: its difference to itself is 0, minus infinity's is NaN.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit  # type: ignore[untyped-decorator]
def _read_row(  # type: ignore[no-untyped-def]
    logits,
    targets,
    normalisers,
    log_probs,
    columns,
    stride,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    highest = tl.full([block], _LOWEST, tl.float32)
    total = tl.zeros([block], tl.float32)
    for start in range(0, columns, block):
        at = start + tl.arange(0, block)
        value = tl.load(logits + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, value)
        total = total * tl.exp(highest - higher) + tl.exp(value - higher)
        highest = higher
    top = tl.max(highest, 0)
    # Two parts: their sum would round away what the lower one adds to large logits.
    rest = tl.log(tl.sum(total * tl.exp(highest - top), 0))
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < columns)
    true = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(normalisers + 2 * row, top)
    tl.store(normalisers + 2 * row + 1, rest)
    tl.store(log_probs + row, (true - top) - rest)


@triton.jit  # type: ignore[untyped-decorator]
def _write_row(  # type: ignore[no-untyped-def]
    logits,
    targets,
    normalisers,
    slopes,
    columns,
    stride,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    top = tl.load(normalisers + 2 * row)
    rest = tl.load(normalisers + 2 * row + 1)
    slope = tl.load(slopes + row)
    target = tl.load(targets + row)
    for start in range(0, columns, block):
        at = start + tl.arange(0, block)
        value = tl.load(logits + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        share = tl.exp((value - top) - rest)
        gradient = slope * (tl.where(at == target, 1.0, 0.0) - share)
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < columns)


def read_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities of the targets and what `write_gradient_` needs to know.

    Args:
        logits: `[N, V]`, float32 or bfloat16, each row contiguous.
        targets: `[N]` int64.

    Returns:
        `[N]` float32 log-probabilities, NaN where the target is no column; `[N, 2]` float32, the
        highest logit and the logarithm of the sum of the exponentials above it.
    """
    log_probs = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    normalisers = torch.empty(len(logits), 2, dtype=torch.float32, device=logits.device)
    _launch(_read_row, logits, targets, normalisers, log_probs)
    return log_probs, normalisers


def write_gradient_(logits: Tensor, targets: Tensor, normalisers: Tensor, slopes: Tensor) -> None:
    """Turns logits into slope · (onehot - softmax), in place.

    Args:
        logits: As in `read_logits`, overwritten.
        normalisers: What `read_logits` returned.
        slopes: `[N]` float32, the loss's derivative by the target's log-probability.
    """
    _launch(_write_row, logits, targets, normalisers, slopes)


def _launch(kernel: Any, logits: Tensor, *rest: Tensor) -> None:
    if not len(logits):
        return
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        kernel[(len(logits),)](
            logits, *rest, logits.shape[1], logits.stride(0), block=_BLOCK, num_warps=_WARPS
        )
