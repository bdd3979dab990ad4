"""The flexible loss from hidden states and the output matrix, without all tokens' logits at once.

The loss is elementwise in log p of the true token, so its gradient for the logits z of a token is
known as soon as its own log p is: dL/dz = f'(log p) · (onehot - softmax(z)). Tokens are taken in
chunks. A chunk's logits become its softmax in place, go into the gradients of the hidden states and
of the matrix, and are overwritten by the next chunk's. Nothing is computed twice: three matrix
products, as without chunks. The gradients exist once the loss does, and wait for the backward pass.

Source:
    Gradients in the forward pass: Liger kernel, arXiv 2410.10989, section 3.2 (cross-entropy).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loss.flexible import flexible_loss_and_slope

# Logits of one chunk: 512 MiB in float32. Each chunk reads and writes the matrix and its gradient
# once more.
_CHUNK_LOGITS = 2**27
# Rows of a product that is added to a float32 total: a whole one would be as large as the total.
# CUDA adds while it multiplies.
_BLOCK_ROWS = 16384


class FusedLoss(NamedTuple):
    """What `fused_flexible_loss` returns.

    Attributes:
        loss_sum: Scalar, sum of token_weight · loss, with a gradient.
        log_probs: `[N]`, log-probability of each target, without a gradient; 0 where the weight
            is 0.
    """

    loss_sum: Tensor
    log_probs: Tensor


class TrainedRows(NamedTuple):
    """Rows that replace some of the output matrix's, such as a few trained tokens'.

    Attributes:
        ids: `[K]` int64, which rows, each at most once.
        values: `[K, H]`, their replacements. These get the gradient, the replaced rows none.
    """

    ids: Tensor
    values: Tensor


class OutputLayer(NamedTuple):
    """What makes logits of hidden states.

    Attributes:
        weight: `[V, H]`, dtype as the hidden states' (under autocast: any).
        bias: `[V]`, added to the logits.
        trained_rows: Rows used in place of the matrix's. Their entry of `bias` still counts.
    """

    weight: Tensor
    bias: Tensor | None = None
    trained_rows: TrainedRows | None = None

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """Writes the logits of hidden states in the matrix's dtype into a buffer."""
        torch.mm(hidden, self.weight.T, out=out)
        if self.trained_rows is not None:
            out.index_copy_(1, self.trained_rows.ids, hidden @ self.trained_rows.values.T)
        return out if self.bias is None else out.add_(self.bias)


def weighted_rows(token_weights: Tensor) -> Tensor:
    """Returns the index, `[M]` int64, of the weights `[N]` that are not 0.

    On a GPU this waits for all work queued before: call it before a model's forward.
    """
    return token_weights.nonzero().squeeze(-1)


def fused_flexible_loss(
    hidden: Tensor,
    layer: OutputLayer,
    targets: Tensor,
    token_weights: Tensor,
    q: float | Tensor,
    gamma: float | Tensor,
    *,
    kept: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """Returns the sum of token_weight · flexible_loss over tokens, from their hidden states.

    The same as logits, log_softmax and `flexible_loss`, in value and in the gradients of hidden
    states and layer; no more than `chunk_tokens` rows of logits exist at once. Only what asks for a
    gradient costs one: none for a frozen matrix, nothing under `torch.no_grad`. Under autocast the
    products run in its dtype. Softmax, loss and the sums over chunks are float32 (float64 for
    float64).

    Args:
        hidden: `[N, H]`, float32, float64 or bfloat16.
        layer: Makes their logits.
        targets: `[N]` int64, below V; anything where the weight is 0.
        token_weights: `[N]`, at least 0. Tokens of weight 0 are left out and cost nothing; their
            hidden states may be anything.
        q: Number or `[N]`; see `flexible_loss`. No gradient.
        gamma: As `q`.
        kept: `weighted_rows(token_weights)`, where the caller has it already.
        chunk_tokens: Tokens a chunk; None takes about 2^27 logits, 1,024 tokens of 128k.

    Returns:
        The sum and the tokens' log-probabilities, float32 (float64 for float64).

    Raises:
        ValueError: Shapes or dtypes that do not go together; a target outside the vocabulary (on
            the CPU; a GPU would have to wait for the check); q, gamma or weights that ask for a
            gradient; a chunk below one token.
    """
    per_token = {"targets": targets, "token_weights": token_weights, "q": q, "gamma": gamma}
    _check_shapes(hidden, layer, per_token)
    weight, bias, trained_rows = layer
    if chunk_tokens is None:
        chunk_tokens = max(_CHUNK_LOGITS // weight.shape[0], 1)
    elif chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, not {chunk_tokens}")
    kept = weighted_rows(token_weights) if kept is None else kept
    dtype = _product_dtype(hidden, weight)
    row_ids, values = (None, None) if trained_rows is None else trained_rows
    tokens = _Tokens(
        targets=_checked_targets(targets[kept], weight.shape[0]),
        weights=token_weights[kept].to(_sum_dtype(dtype)),
        q=_at(q, kept),
        gamma=_at(gamma, kept),
        row_ids=row_ids,
        chunk=chunk_tokens,
        dtype=dtype,
        with_gradients=torch.is_grad_enabled(),
    )
    loss_sum, log_probs = _Fused.apply(tokens, hidden[kept], weight, bias, values)  # type: ignore[no-untyped-call]
    everywhere = torch.zeros(targets.shape, dtype=log_probs.dtype, device=log_probs.device)
    return FusedLoss(loss_sum, everywhere.index_copy(0, kept, log_probs))


@dataclass(frozen=True)
class _Tokens:
    """Everything about the M kept tokens that has no gradient."""

    targets: Tensor
    weights: Tensor
    q: float | Tensor
    gamma: float | Tensor
    row_ids: Tensor | None
    chunk: int
    dtype: torch.dtype
    with_gradients: bool

    def rows(self, values: Tensor | None) -> TrainedRows | None:
        """The trained rows in the products' dtype."""
        if values is None or self.row_ids is None:
            return None
        return TrainedRows(self.row_ids, values.to(self.dtype))

    def losses(self, log_probs: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """The weighted losses' sum over a chunk, and their derivatives by log p, `[chunk]`."""
        q, gamma = (
            value[part] if isinstance(value, Tensor) and value.dim() else value
            for value in (self.q, self.gamma)
        )
        losses, slopes = flexible_loss_and_slope(log_probs, q, gamma)
        weights = self.weights[part]
        return torch.dot(losses, weights), slopes * weights


@dataclass
class _Gradients:
    """Of the sum of the losses; None for what asks for none."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    values: Tensor | None

    def scaled(self, factor: Tensor) -> tuple[Tensor | None, ...]:
        """Hands the buffers out, each times the factor. Autograd casts to the inputs' dtypes."""
        return tuple(None if one is None else one.mul_(factor) for one in vars(self).values())

    def add(self, part: slice, layer: OutputLayer, hidden: Tensor, of_logits: Tensor) -> None:
        """Adds a chunk's share.

        Args:
            hidden: `[chunk, H]`.
            of_logits: `[chunk, V]`, gradient of the logits; 0 at the trained rows afterwards.
        """
        if self.bias is not None:
            self.bias += of_logits.sum(0, dtype=self.bias.dtype)
        if layer.trained_rows is not None:
            self._add_rows(part, layer.trained_rows, hidden, of_logits)
        if self.hidden is not None:
            _add_product(self.hidden[part], of_logits, layer.weight)
        if self.weight is not None:
            _add_product(self.weight, of_logits.T, hidden)

    def _add_rows(self, part: slice, rows: TrainedRows, hidden: Tensor, of_logits: Tensor) -> None:
        of_rows = of_logits.index_select(1, rows.ids)
        of_logits.index_fill_(1, rows.ids, 0.0)
        if self.values is not None:
            _add_product(self.values, of_rows.T, hidden)
        if self.hidden is not None:
            _add_product(self.hidden[part], of_rows, rows.values)


class _Fused(torch.autograd.Function):
    """Hidden states, matrix, bias, trained rows → sum of losses, log-probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: _Tokens,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = (hidden, weight, bias, values)
        ctx.tokens = tokens
        ctx.wanted = [tokens.with_gradients and wants for wants in ctx.needs_input_grad[1:]]
        loss_sum, log_probs, ctx.gradients = _in_chunks(tokens, inputs, ctx.wanted)
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(log_probs)
        return loss_sum, log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A second pass through a retained graph; the first one gave the buffers away.
            gradients = _in_chunks(ctx.tokens, ctx.saved_tensors, ctx.wanted)[2]
        return None, *gradients.scaled(of_sum)


def _in_chunks(
    tokens: _Tokens, inputs: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, _Gradients]:
    """Loss sum, log-probabilities `[M]` and the gradients of what is wanted."""
    hidden, weight, bias, values = inputs
    assert hidden is not None
    assert weight is not None
    exact = _sum_dtype(tokens.dtype)
    gradients = _Gradients(
        *(
            torch.zeros_like(one, dtype=exact) if wants and one is not None else None
            for one, wants in zip(inputs, wanted, strict=True)
        )
    )
    log_probs = torch.empty(len(hidden), dtype=exact, device=hidden.device)
    total = torch.zeros((), dtype=exact, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        layer = OutputLayer(
            weight.to(tokens.dtype),
            None if bias is None else bias.to(tokens.dtype),
            tokens.rows(values),
        )
        chunk = min(tokens.chunk, len(hidden))
        buffer = hidden.new_empty(chunk, len(weight), dtype=tokens.dtype)
        softmax = _softmax(buffer, exact)
        for start in range(0, len(hidden), max(chunk, 1)):
            part = slice(start, min(start + chunk, len(hidden)))
            size = part.stop - start
            states = hidden[part].to(tokens.dtype)
            logits = layer.logits(states, buffer[:size])
            part_sum, log_probs[part] = softmax(tokens, part, logits)
            total += part_sum
            if any(wanted):
                gradients.add(part, layer, states, logits)
    return total, log_probs, gradients


class _ToGradient(Protocol):
    """Turns a chunk's logits into their gradient, in place.

    Args:
        logits: `[chunk, V]`, overwritten.

    Returns:
        The chunk's loss sum and log-probabilities `[chunk]`.
    """

    def __call__(self, tokens: _Tokens, part: slice, logits: Tensor) -> tuple[Tensor, Tensor]: ...


def _softmax(buffer: Tensor, exact: torch.dtype) -> _ToGradient:
    """Returns the way for logits that stand in this buffer, softmax in the dtype `exact`."""
    if buffer.is_cuda and exact == torch.float32 and find_spec("triton") is not None:
        return _to_gradient_in_kernels
    # Apart from the products' buffer only where it has another dtype.
    work = buffer if buffer.dtype == exact else torch.empty_like(buffer, dtype=exact)
    return partial(_to_gradient, work)


def _to_gradient_in_kernels(tokens: _Tokens, part: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
    # Triton comes with torch for GPUs alone.
    from loss.softmax_kernels import read_logits, write_gradient_

    targets = tokens.targets[part]
    log_probs, normalisers = read_logits(logits, targets)
    loss_sum, slopes = tokens.losses(log_probs, part)
    write_gradient_(logits, targets, normalisers, slopes)
    return loss_sum, log_probs


def _to_gradient(
    whole_work: Tensor, tokens: _Tokens, part: slice, logits: Tensor
) -> tuple[Tensor, Tensor]:
    work = whole_work[: len(logits)]
    targets = tokens.targets[part, None]
    highest = logits.amax(-1, keepdim=True)
    # Widened before the difference: a bfloat16 one would be rounded once more.
    work.copy_(logits).sub_(highest)
    true = work.gather(-1, targets)
    sums = work.exp_().sum(-1, keepdim=True)
    log_probs = (true - sums.log()).squeeze(-1)
    loss_sum, slopes = tokens.losses(log_probs, part)
    # slope · (onehot - e/sum) = (-slope/sum) · (e - sum · onehot).
    work.scatter_add_(-1, targets, -sums)
    torch.mul(work, -slopes[:, None] / sums, out=logits)
    return loss_sum, log_probs


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Does total += left @ right, in total's dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
        return
    if total.is_cuda and torch.version.cuda is not None:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    for start in range(0, len(total), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        total[block] += left[block] @ right


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype:
        raise ValueError(
            f"hidden is {dtype} and weight {weight.dtype}: outside autocast they must agree"
        )
    if dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(
            f"the products would be in {dtype}, where small gradients vanish; use bfloat16"
        )
    return dtype


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _at(value: float | Tensor, kept: Tensor) -> float | Tensor:
    return value[kept] if isinstance(value, Tensor) and value.dim() else value


def _checked_targets(targets: Tensor, vocabulary: int) -> Tensor:
    """A GPU would wait for the check; there the loss is NaN, or an assertion ends the run."""
    if targets.device.type == "cpu" and targets.numel():
        lowest, highest = int(targets.min()), int(targets.max())
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(
                f"target {wrong} has a weight and is outside the vocabulary of {vocabulary}"
            )
    return targets


def _check_shapes(hidden: Tensor, layer: OutputLayer, per_token: dict[str, float | Tensor]) -> None:
    weight, bias, _ = layer
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be [N, H] and weight [V, H], not {list(hidden.shape)} and "
            f"{list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], not {list(bias.shape)}")
    for name, value in per_token.items():
        number = name in ("q", "gamma") and not (isinstance(value, Tensor) and value.dim())
        if not number and (not isinstance(value, Tensor) or value.shape != hidden.shape[:1]):
            shape = list(value.shape) if isinstance(value, Tensor) else "a number"
            raise ValueError(f"{name} must be [{hidden.shape[0]}], one per token, not {shape}")
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} gets no gradient here; detach it")
