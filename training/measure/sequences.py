"""Sequences, the places in them where something is predicted, and batches of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from models.manifest import Manifest
from training.data.encoding import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Entries of the logits that one forward pass may make: 512 MiB in fp32.
LOGITS_AT_ONCE = 2**27


class TokenSequence(NamedTuple):
    """A sequence and where something is predicted in it.

    Attributes:
        ids: `[tokens]`.
        positions: Places whose next token is asked for.
        targets: The right token at each of these places.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    targets: Sequence[int]


class Batch(NamedTuple):
    """Sequences padded on the right to one length.

    Nothing attends to what comes later, so padding there changes no other place and needs no mask.

    Attributes:
        members: `[B]` which sequences they are.
        input_ids: `[B, T]` int64.
        kept: `[U]` int64, the places that are asked for in any of them.
        row: `[N]` int64, for each asked place its sequence in the batch.
        column: `[N]` int64, its place within `kept`.
        target: `[N]` int64, the right token there.
    """

    members: list[int]
    input_ids: torch.Tensor
    kept: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    target: torch.Tensor

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        """Returns the `[N, V]` fp32 logits at the asked places, of `[B, U, V]` that are made."""
        device = next(model.parameters()).device
        output = model(
            input_ids=self.input_ids.to(device),
            logits_to_keep=self.kept.to(device),
            use_cache=False,
        )
        picked: torch.Tensor = output.logits[self.row.to(device), self.column.to(device)]
        return picked.float()


def decision_of(example: Example, manifest: Manifest) -> TokenSequence:
    """Returns the prompt of the last assistant turn; its control token is the target."""
    controls = set(manifest.control_ids)
    at = max(place for place, token in enumerate(example.input_ids) if token in controls)
    return TokenSequence(example.input_ids[:at], [at - 1], [example.input_ids[at]])


def text_of(
    example: Example, control_ids: Sequence[int], *, keep_controls: bool = True
) -> TokenSequence:
    """Returns the whole row; what the assistant says behind its control tokens is the target."""
    controls = set(control_ids)
    ids: list[int] = []
    positions: list[int] = []
    for token, weight in zip(example.input_ids, example.weights, strict=True):
        if token not in controls:
            if weight > 0:
                positions.append(len(ids) - 1)
            ids.append(token)
        elif keep_controls:
            ids.append(token)
    return TokenSequence(ids, positions, [ids[place + 1] for place in positions])


def padding_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns what shorter sequences are filled with; nothing ever attends to it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def batches(
    sequences: Sequence[TokenSequence], batch_size: int, vocabulary: int, pad_id: int
) -> list[Batch]:
    """Puts sequences of about the same length together.

    Args:
        vocabulary: Entries of the vocabulary. A batch ends before its logits, one for each
            sequence, asked place and entry, exceed `LOGITS_AT_ONCE`.
        pad_id: What shorter sequences are filled with, on the right.
    """
    order = sorted(
        range(len(sequences)), key=lambda at: (sequences[at].positions[0], len(sequences[at].ids))
    )
    groups: list[list[int]] = []
    kept: set[int] = set()
    for at in order:
        wider = kept | set(sequences[at].positions)
        rows = len(groups[-1]) + 1 if groups else 0
        if not rows or rows > batch_size or rows * len(wider) * vocabulary > LOGITS_AT_ONCE:
            groups.append([])
            wider = set(sequences[at].positions)
        groups[-1].append(at)
        kept = wider
    return [_batch(group, [sequences[at] for at in group], pad_id) for group in groups]


def _batch(members: list[int], sequences: Sequence[TokenSequence], pad_id: int) -> Batch:
    longest = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.full((len(sequences), longest), pad_id)
    for at, sequence in enumerate(sequences):
        input_ids[at, : len(sequence.ids)] = torch.tensor(sequence.ids)
    asked = [(at, place) for at, sequence in enumerate(sequences) for place in sequence.positions]
    kept = sorted({place for _, place in asked})
    columns = {place: column for column, place in enumerate(kept)}
    column = torch.tensor([columns[place] for _, place in asked])
    row = torch.tensor([at for at, _ in asked])
    target = torch.tensor([token for sequence in sequences for token in sequence.targets])
    return Batch(members, input_ids, torch.tensor(kept), row, column, target)
