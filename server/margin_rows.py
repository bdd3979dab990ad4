"""The worker's side of server/generation/margins.py: writes the rows."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from server.generation.margins import MARGINS, ROWS, Ticket


# More boards than HTTP processes of a server: to map one anew takes far longer than a step.
@lru_cache(maxsize=256)
def map_rows(path: str, categories: int) -> torch.Tensor:
    """Maps the file of a board, ``[rows, 2 + categories]`` fp32: tag, log-normaliser, margins.

    With CUDA the memory is page-locked, so that the host need not wait for the device to write it.
    If the file does not exist, it is created, and nobody reads it.
    """
    width = MARGINS + categories
    rows = torch.from_file(path, shared=True, size=ROWS * width, dtype=torch.float32)
    if torch.cuda.is_available():
        cudart: Any = torch.cuda.cudart  # torch leaves it without annotations
        cudart().cudaHostRegister(rows.data_ptr(), 4 * rows.numel(), 0)
    return rows.view(ROWS, width)


def write_rows(
    tickets: Sequence[Ticket],
    tags: torch.Tensor,
    log_normaliser: torch.Tensor,
    logits: torch.Tensor,
) -> None:
    """Writes one row a ticket without waiting for the device.

    Args:
        tickets: Name the rows.
        tags: ``[tickets]`` fp32, the tickets' tags on the logits' device.
        log_normaliser: ``[tickets]`` fp32, log-sum-exp of the whole vocabulary.
        logits: ``[tickets, k + 1]`` fp32, the control tokens', the respond token last.
    """
    respond = logits[:, -1:]
    columns = (tags.unsqueeze(1), log_normaliser.unsqueeze(1) - respond, logits[:, :-1] - respond)
    values = torch.cat(columns, dim=1)
    for ticket, value in zip(tickets, values, strict=True):
        board = map_rows(ticket.path, logits.shape[1] - 1)
        board[ticket.row].copy_(value, non_blocking=True)
