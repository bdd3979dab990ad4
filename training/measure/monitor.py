"""Measures a model on the decision token while it is trained."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from models.errors import ConfigError, EvaluationError
from models.manifest import Manifest
from training.config.data import TooLong
from training.data.encoding import DecisionWeights, Example, encode_rows, fit, fit_one
from training.data.rows import Row
from training.measure.metrics import Floats, decision_metrics
from training.measure.sequences import Batch, batches, decision_of, padding_id, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_ROWS = 256

Result = TypeVar("Result")


class Measurement(NamedTuple):
    """What was measured, one entry a row in the order of the rows.

    Attributes:
        margins: `[n, k]` log-odds of refusing for a category against responding, from fp32 logits.
        truth: The category a row should be refused for, or None.
    """

    margins: Floats
    truth: tuple[str | None, ...]
    categories: tuple[str, ...]
    metrics: dict[str, float]


class DecisionMonitor:
    """Measures how well a model decides, and how well it still writes, on rows kept for that.

    Everything is rendered and put into batches once. With several processes every one of them must
    call `measure` at the same time: each takes its share of the batches, in equally many forward
    passes (FSDP hangs otherwise), and all of them get the whole result, the same to the bit.

    Args:
        rows: The rows, none of them trained on. A row without response is measured on its decision
            alone.
        max_length: Longest row in tokens, None for any length.
        too_long: What happens to longer rows, as in the training: their responses are cut, they
            are left out, or they are an error.
        batch_size: Rows of one forward pass; fewer where their logits would take too much memory.
        text_rows: The text loss is measured on at most so many rows, drawn once.

    Attributes:
        rows: The rows that are measured.
        left_out: How many were too long and are not.

    Raises:
        ConfigError: There are no rows, or one of them cannot be encoded or is too long.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        tokenizer: "PreTrainedTokenizerBase",
        manifest: Manifest,
        *,
        max_length: int | None,
        too_long: TooLong = "cut",
        batch_size: int = 32,
        text_rows: int = TEXT_ROWS,
        seed: int = 0,
    ) -> None:
        # Every token of the assistant has a weight above 0.
        weights = DecisionWeights(plain=1.0, pair=1.0)
        encoded = list(
            zip(rows, encode_rows(rows, tokenizer, manifest, weights, None), strict=True)
        )
        if max_length is not None and too_long in ("drop", "cut_or_drop"):
            encoded = [one for one in encoded if fit_one(one[1], max_length, too_long) is not None]
        if not encoded:
            why = f": all {len(rows)} are too long for the model" if rows else ""
            raise ConfigError(f"evaluation.data: there are no rows to measure on{why}")
        self.rows = tuple(row for row, _ in encoded)
        self.left_out = len(rows) - len(encoded)
        examples = [example for _, example in encoded]
        if max_length is not None:
            examples = fit(self.rows, examples, max_length, too_long)
        decisions = [decision_of(example, manifest) for example in examples]
        named: dict[int, str | None] = {c.id: c.name for c in manifest.categories}
        self._controls = manifest.control_ids
        self._categories = tuple(manifest.names)
        self._truth = tuple(named.get(decision.targets[0]) for decision in decisions)
        self._near_miss = [row.near_miss for row in self.rows]
        vocabulary = len(tokenizer)
        pad_id = padding_id(tokenizer)
        self._decisions = batches(decisions, batch_size, vocabulary, pad_id)
        drawn = _drawn(examples, text_rows, self._controls, seed)
        self._texts = {
            kept: batches(
                [text_of(example, self._controls, keep_controls=kept) for example in drawn],
                batch_size,
                vocabulary,
                pad_id,
            )
            for kept in (True, False)
        }

    def metric_names(self) -> set[str]:
        """Returns the metrics that these rows can tell: what `measure` will return."""
        nothing = np.zeros((len(self._truth), len(self._categories)))
        known = {*self._decision_metrics(nothing), "vocabulary_loss"}
        return known | {"text_loss"} if self._texts[True] else known

    def measure(self, model: torch.nn.Module) -> Measurement:
        """Measures a model; its modes, gradients and random state stay as they are.

        Args:
            model: A causal language model whose `forward` knows `logits_to_keep`, bare or wrapped
                for several processes.

        Returns:
            Margins, truth and metrics. The metrics are those of `decision_metrics`, and

            * `loss`: cross-entropy of the right control token among the control tokens, what
              serving depends on, since it masks all others;
            * `vocabulary_loss`: the same over the whole vocabulary, what the training minimises;
              the difference is what the model gives to tokens that are none of the control tokens;
            * `text_loss`: mean cross-entropy of the response tokens behind the right control token.

        Raises:
            EvaluationError: A logit is not finite.
        """
        with measuring(model):
            parts = shared(self._decisions, lambda batch: self._decide(model, batch), "decisions")
        margins = np.empty((len(self._truth), len(self._categories)))
        losses = np.empty(len(self._truth))
        for batch, (found, loss) in zip(self._decisions, parts, strict=True):
            margins[batch.members] = found
            losses[batch.members] = loss
        if broken := int((~np.isfinite(margins)).any(axis=1).sum()):
            raise EvaluationError(
                f"the decision of {broken} of {len(margins)} rows is not a finite number: the "
                "training has diverged; lower optimisation.learning_rate or use bf16: false"
            )
        metrics = self._decision_metrics(margins)
        metrics["vocabulary_loss"] = float(losses.mean())
        if (text_loss := self.text_loss(model)) is not None:
            metrics["text_loss"] = text_loss
        return Measurement(margins, self._truth, self._categories, metrics)

    def text_loss(self, model: torch.nn.Module, *, control_tokens: bool = True) -> float | None:
        """Returns the mean cross-entropy in nats of the response tokens, None without any.

        The end-of-turn token is one of them, the control token is not.

        Args:
            control_tokens: Whether each response stands behind its right control token. Without
                them the rows read as the model knew them before it had any: compare that, before
                the training, with the loss behind control tokens after it.
        """
        with measuring(model):
            parts = shared(
                self._texts[control_tokens], lambda batch: _cross_entropy(model, batch), "text loss"
            )
        tokens = sum(count for _, count in parts)
        return sum(loss for loss, _ in parts) / tokens if tokens else None

    def seconds(self, model: torch.nn.Module) -> float:
        """Returns how long `measure` takes, extrapolated from two batches."""
        with measuring(model):
            return sum(
                _seconds(work, do)
                for work, do in (
                    (self._decisions, lambda batch: self._decide(model, batch)),
                    (self._texts[True], lambda batch: _cross_entropy(model, batch)),
                )
            )

    def _decide(self, model: torch.nn.Module, batch: Batch) -> tuple[Floats, Floats]:
        """Returns `[B, k]` margins and `[B]` cross-entropies over the whole vocabulary."""
        logits = batch.logits(model)
        controls = logits[:, self._controls]
        margins = controls[:, :-1] - controls[:, -1:]
        losses = torch.nn.functional.cross_entropy(
            logits, batch.target.to(logits.device), reduction="none"
        )
        return margins.double().cpu().numpy(), losses.double().cpu().numpy()

    def _decision_metrics(self, margins: Floats) -> dict[str, float]:
        return decision_metrics(margins, self._truth, self._categories, self._near_miss)


@contextmanager
def measuring(model: torch.nn.Module) -> Iterator[None]:
    """Turns dropout and gradients off, and every module's mode back to what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: what a module keeps from a first forward pass within it (rotary
        # tables, FSDP's buffers) could not take part in the training afterwards.
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def shared(work: Sequence[Batch], do: Callable[[Batch], Result], measured: str) -> list[Result]:
    """Returns the result of each batch, in order, each done by one of the processes.

    Args:
        work: The batches, the same in every process.
        do: What is done with each. Every process calls it equally often, some for nothing.
        measured: What the progress bar, on a terminal, says is measured.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if distributed else 0
    world = torch.distributed.get_world_size() if distributed else 1
    own: dict[int, Result] = {}
    # None: no bar where the output is no terminal.
    hidden = True if rank > 0 else None
    starts = range(0, len(work), world)
    for start in tqdm(starts, f"measuring: {measured}", leave=False, disable=hidden):
        at = min(start + rank, len(work) - 1)
        result = do(work[at])
        if start + rank == at:
            own[at] = result
    everyones: list[Any] = [own]
    if world > 1:
        everyones = [None] * world
        torch.distributed.all_gather_object(everyones, own)
    whole = {at: result for part in everyones for at, result in part.items()}
    return [whole[at] for at in range(len(work))]


def _seconds(work: Sequence[Batch], do: Callable[[Batch], object]) -> float:
    """Returns how long all batches take, extrapolated from the last one, the longest."""
    if not work:
        return 0.0
    do(work[0])  # warms up
    began = time.perf_counter()
    do(work[-1])
    spent = time.perf_counter() - began
    return spent * sum(batch.input_ids.numel() for batch in work) / work[-1].input_ids.numel()


def _drawn(
    examples: Sequence[Example], count: int, control_ids: Sequence[int], seed: int
) -> list[Example]:
    with_text = [example for example in examples if text_of(example, control_ids).positions]
    if len(with_text) <= count:
        return with_text
    return random.Random(seed).sample(with_text, count)


def _cross_entropy(model: torch.nn.Module, batch: Batch) -> tuple[float, int]:
    """Returns the sum over the asked places, and how many there are."""
    logits = batch.logits(model)
    losses = torch.nn.functional.cross_entropy(
        logits, batch.target.to(logits.device), reduction="none"
    )
    return float(losses.double().sum()), len(losses)
