"""Rows as batches: packed, collated, and dealt out to processes in an order that can be resumed."""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from training.data.encoding import Example

IGNORED = -100
BATCHES_A_BUCKET = 50
NOTHING = -1
"""Stands for a row in a batch that has none: a process must take as many steps as the others."""


def as_dataset(examples: Sequence[Example], max_length: int = 0) -> Dataset:
    """Returns rows as a data set; with `max_length`, short ones share a sequence.

    Positions start from 0 in each row; the model's attention keeps rows apart by that
    (training/run/assembly.py checks that it does). The first token of a row is never learnt.

    Args:
        max_length: Longest sequence that several rows may share, in tokens.

    Returns:
        The columns `input_ids`, `weights`, `position_ids` (lists) and `length`.
    """
    bins = _fill_bins([len(example.input_ids) for example in examples], max_length)
    return Dataset.from_dict(
        {
            "input_ids": [[t for row in rows for t in examples[row].input_ids] for rows in bins],
            "weights": [
                [w for row in rows for w in (0.0, *examples[row].weights[1:])] for rows in bins
            ],
            "position_ids": [
                [at for row in rows for at in range(len(examples[row].input_ids))] for rows in bins
            ],
            "length": [sum(len(examples[row].input_ids) for row in rows) for rows in bins],
        }
    )


def _fill_bins(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Puts rows into bins, each row into the fullest one that has room, the longest rows first."""
    if size == 0:
        return [[row] for row in range(len(lengths))]
    bins: list[list[int]] = []
    waiting: dict[int, list[int]] = {}
    rooms: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        best = bisect_left(rooms, lengths[row])
        room = rooms[best] if best < len(rooms) else max(size, lengths[row])
        at = waiting[room].pop() if best < len(rooms) else len(bins)
        if at == len(bins):
            bins.append([])
        elif not waiting[room]:
            del waiting[room], rooms[best]
        bins[at].append(row)
        left = room - lengths[row]
        if left not in waiting:
            insort(rooms, left)
        waiting.setdefault(left, []).append(at)
    return bins


class Collator(NamedTuple):
    """Puts rows into one batch.

    Attributes:
        pad_id: What shorter rows are filled with, on the right.
        packed: Whether sequences hold several rows, so that the model needs their positions.
    """

    pad_id: int
    packed: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels` (int64) and `weights` (fp32), each `[B, T]`.

        With `packed` also `position_ids` (int64).
        """
        longest = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), longest), self.pad_id)
        weights = torch.zeros(len(rows), longest)
        positions = torch.arange(longest).repeat(len(rows), 1)
        for at, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[at, :length] = torch.tensor(row["input_ids"])
            weights[at, :length] = torch.tensor(row["weights"])
            if self.packed:
                positions[at, :length] = torch.tensor(row["position_ids"])
                positions[at, length:] = torch.arange(longest - length)
        batch = {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(weights == 0, IGNORED),
            "weights": weights,
        }
        return {**batch, "position_ids": positions} if self.packed else batch


class LengthBuckets(Sampler[list[int]]):
    """Shuffles rows so that those of one step are about equally long, and deals them out.

    The order depends on the seed, the pass and the rows of a step alone: not on how many processes
    or micro-batches share a step, nor on what was drawn before. The steps are shuffled too:
    transformers' `group_by_length` hands out each bucket from the longest batch to the shortest,
    and the last thing learnt is then the shortest texts.

    Args:
        batch_size: Rows of a micro-batch.
        accumulation: Micro-batches a process takes in a step.
        processes: How many share a step.
        process: Which of them this is.
        seed: Seed of the order; every pass has another.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        accumulation: int = 1,
        processes: int = 1,
        process: int = 0,
    ) -> None:
        self._lengths = list(lengths)
        self._step_size = batch_size * accumulation * processes
        self._accumulation = accumulation
        self._processes = processes
        self._process = process
        self._seed = seed
        self._pass = 0

    def set_epoch(self, epoch: int) -> None:
        """Says which pass comes next, from 0."""
        self._pass = epoch

    def __len__(self) -> int:
        """Returns the micro-batches of one pass for this process."""
        return -(-len(self._lengths) // self._step_size) * self._accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps():
            shares = self._accumulation * self._processes
            for at in range(self._process, shares, self._processes):
                start, stop = (len(step) * edge // shares for edge in (at, at + 1))
                yield step[start:stop] or [NOTHING]

    def _steps(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._pass)
        order: list[int] = torch.randperm(len(self._lengths), generator=generator).tolist()
        steps = list(self._buckets(order))
        # The scheduler counts on full steps first, and so does who compares two runs' logs.
        short = [steps.pop()] if len(steps[-1]) < self._step_size else []
        for at in torch.randperm(len(steps), generator=generator).tolist():
            yield steps[at]
        yield from short

    def _buckets(self, order: Sequence[int]) -> Iterator[list[int]]:
        size = self._step_size
        for start in range(0, len(order), size * BATCHES_A_BUCKET):
            bucket = order[start : start + size * BATCHES_A_BUCKET]
            ordered = sorted(bucket, key=self._lengths.__getitem__)
            yield from (ordered[at : at + size] for at in range(0, len(ordered), size))


class Loader(DataLoader[dict[str, torch.Tensor]]):
    """Loads what `LengthBuckets` deals out.

    It draws nothing from the global random state: a resumed run would draw at other moments.
    """

    def __init__(self, dataset: Dataset, order: LengthBuckets, collator: Collator) -> None:
        super().__init__(
            _WithNothing(dataset, collator.pad_id),
            batch_sampler=order,
            collate_fn=collator.__call__,
            generator=torch.Generator(),
        )
        self._order = order

    def set_epoch(self, epoch: int) -> None:
        """Says which pass comes next, from 0."""
        self._order.set_epoch(epoch)


class _WithNothing(TorchDataset[dict[str, Any]]):
    def __init__(self, dataset: Dataset, pad_id: int) -> None:
        self._dataset = dataset
        # Two tokens, so that there is a next one to give a log-probability.
        self._nothing = {"input_ids": [pad_id] * 2, "weights": [0.0] * 2, "position_ids": [0, 1]}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        found: dict[str, Any] = self._nothing if row == NOTHING else self._dataset[row]
        return found
