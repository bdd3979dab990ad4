"""The SFT trainer whose loss weighs each token."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import SFTTrainer

from training.data import Example

IGNORED = -100
BATCHES_A_BUCKET = 50


class ControlTokenTrainer(SFTTrainer):
    """Trains on rows that carry a loss weight for each token.

    Args:
        control_ids: Ids of the control tokens; the log shows their loss apart from the text's.
        seed: Seed of the order of the rows.
        **options: What `SFTTrainer` takes. `train_dataset` comes from `as_dataset`, `data_collator`
            is a `Collator`.
    """

    def __init__(self, *, control_ids: Sequence[int], seed: int, **options: Any) -> None:
        super().__init__(**options)
        # The weighted mean is over one batch; Trainer then averages accumulated batches itself.
        self.model_accepts_loss_kwargs = False
        self._control_ids = torch.tensor(list(control_ids))
        self._order_seed = seed

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Returns the weighted mean of the tokens' cross-entropy.

        Args:
            model: The model as Trainer wrapped it.
            inputs: What `Collator` returns.
            return_outputs: Must be false; there are no logits to return.
            num_items_in_batch: Not used: the weights normalise.

        Raises:
            ValueError: `return_outputs` is true.
        """
        if return_outputs:
            raise ValueError("the loss comes from log-probabilities; there are no outputs")
        labels = inputs["labels"]
        log_probs = token_log_probs(model, inputs["input_ids"], labels)
        weights = inputs["weights"][:, 1:]
        self._note_parts(-log_probs.detach(), labels[:, 1:])
        return weighted_mean(-log_probs, weights)

    def _note_parts(self, losses: torch.Tensor, targets: torch.Tensor) -> None:
        learnt = targets != IGNORED
        decision = learnt & torch.isin(targets, self._control_ids.to(targets.device))
        for name, mask in (("decision_loss", decision), ("text_loss", learnt & ~decision)):
            if mask.any():
                self._metrics["train"][name].append(losses[mask].mean().item())

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return LengthBuckets(dataset["length"], self.args.train_batch_size, self._order_seed)


def token_log_probs(
    model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Returns the log-probability of each next token that has a label.

    Args:
        model: A causal language model that `SFTTrainer` has given its fused head.
        input_ids: `[B, T]` int64, padded on the right, so that no token attends to padding.
        labels: `[B, T]` int64, `IGNORED` where nothing is learnt.

    Returns:
        `[B, T - 1]` fp32, 0 where the next token has no label.
    """
    if input_ids.device.type != "cpu":
        outputs = model(input_ids=input_ids, labels=labels, fused_lm_head=True)
        log_probs: torch.Tensor = outputs.log_probs
        return log_probs
    # TRL's fused head saves memory by computing logits twice, and off the GPU for the prompts too.
    # On a CPU, where models are small, a step of the demo took 2.5 times as long with it.
    targets = labels[:, 1:]
    learnt = targets != IGNORED
    first = int(learnt.any(dim=0).int().argmax())
    logits = model(input_ids=input_ids, logits_to_keep=input_ids.shape[1] - first).logits[:, :-1]
    chosen = learnt[:, first:]
    losses = torch.nn.functional.cross_entropy(
        logits[chosen].float(), targets[:, first:][chosen], reduction="none"
    )
    return torch.zeros(targets.shape).masked_scatter(learnt, -losses)


def weighted_mean(losses: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the mean of the losses by weight, and 0 where all weights are 0.

    Args:
        losses: `[B, T]` fp32.
        weights: `[B, T]` fp32, not negative.
    """
    total = weights.sum()
    return (losses * weights).sum() / torch.where(total > 0, total, torch.ones_like(total))


def as_dataset(examples: Sequence[Example]) -> Dataset:
    """Returns the rows in the form that `ControlTokenTrainer` takes."""
    return Dataset.from_dict(
        {
            "input_ids": [example.input_ids for example in examples],
            "weights": [example.weights for example in examples],
            "length": [len(example.input_ids) for example in examples],
        }
    )


class Collator(NamedTuple):
    """Puts rows into one batch.

    Attributes:
        pad_id: What shorter rows are filled with, on the right.
    """

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `labels` (int64) and `weights` (fp32), each `[B, T]`."""
        longest = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), longest), self.pad_id)
        weights = torch.zeros(len(rows), longest)
        for at, row in enumerate(rows):
            input_ids[at, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            weights[at, : len(row["weights"])] = torch.tensor(row["weights"])
        return {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(weights == 0, IGNORED),
            "weights": weights,
        }


class LengthBuckets(Sampler[int]):
    """Shuffles rows so that those of one batch are about equally long.

    The batches are shuffled too: transformers' `group_by_length` hands out each bucket from the
    longest batch to the shortest, and the last thing learnt is then the shortest texts.

    Args:
        lengths: Length of each row.
        batch_size: Rows a batch.
        seed: Seed of the order; every pass has another.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        order: list[int] = torch.randperm(len(self), generator=self._generator).tolist()
        batches = list(self._batches(order))
        # A short batch must stay last, or every later one would be cut at the wrong place.
        short = [batches.pop()] if len(batches[-1]) < self._batch_size else []
        for at in torch.randperm(len(batches), generator=self._generator).tolist():
            yield from batches[at]
        for batch in short:
            yield from batch

    def _batches(self, order: Sequence[int]) -> Iterator[list[int]]:
        size = self._batch_size
        for start in range(0, len(order), size * BATCHES_A_BUCKET):
            bucket = order[start : start + size * BATCHES_A_BUCKET]
            ordered = sorted(bucket, key=self._lengths.__getitem__)
            yield from (ordered[at : at + size] for at in range(0, len(ordered), size))
