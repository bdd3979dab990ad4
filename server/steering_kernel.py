"""The V2 processor's step on a GPU: one kernel, one program a row.

The same in torch operations takes 15 launches and reads and writes all rows' logits.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


@triton.jit  # type: ignore[untyped-decorator]
def _steer_row(  # type: ignore[no-untyped-def]
    logits,
    stride,
    columns,
    slots,
    positions,
    prompt_lengths,
    values,
    width,
    ids,
    choices,
    never,
    nevers,
    some: tl.constexpr,
    some_never: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    logits += row.to(tl.int64) * stride
    values += slot * width
    steered = tl.load(values + width - 1) > 0
    decides = steered & (tl.load(positions + row) + 1 == tl.load(prompt_lengths + slot))
    nothing = -float("inf")
    if decides:
        choice = tl.arange(0, some)
        inside = choice < choices
        token = tl.load(ids + choice, mask=inside, other=0)
        own = tl.load(logits + token, mask=inside, other=nothing)
        respond = tl.sum(tl.where(choice == choices - 1, own, 0.0), 0)
        shift = tl.load(values + choice, mask=inside, other=nothing)
        chosen = tl.load(ids + tl.argmax(own - respond + shift, 0))
        tl.debug_barrier()  # every warp has read what the first one to go on will overwrite
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            tl.store(logits + at, tl.where(at == chosen, 0.0, nothing), mask=at < columns)
    else:
        place = tl.arange(0, some_never)
        there = place < nevers
        masked = tl.load(never + place, mask=there, other=0)
        tl.store(logits + masked, tl.full([some_never], nothing, tl.float32), mask=there)


def steer_rows(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    prompt_lengths: Tensor,
    values: Tensor,
    ids: Tensor,
    never: Tensor,
) -> None:
    """Masks in place: a deciding row all but its choice, another row what is never text.

    Args:
        logits: ``[rows, vocabulary]`` fp32, each row contiguous.
        slots: ``[rows]``, each row's slot.
        positions: ``[rows]`` of each row's last token.
        prompt_lengths: ``[slots]``.
        values: ``[slots, width]`` fp32: a row of ``dial_row``, then whether the slot is steered.
        ids: ``[k + 1]``, the control tokens, the respond token last.
        never: ``[n]``, tokens that no text contains.
    """
    kernel: Any = _steer_row[(len(logits),)]
    kernel(
        logits,
        logits.stride(0),
        logits.shape[1],
        slots,
        positions,
        prompt_lengths,
        values,
        values.stride(0),
        ids,
        len(ids),
        never,
        len(never),
        some=triton.next_power_of_2(len(ids)),
        some_never=triton.next_power_of_2(len(never)),
        block=_BLOCK,
        num_warps=_WARPS,
    )
