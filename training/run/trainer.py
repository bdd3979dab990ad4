"""The SFT trainer of control tokens: its losses, its log, and what it does at which step."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_trainer import SFTTrainer

from loss.flexible import flexible_loss
from models.manifest import Manifest
from training.config.loss import LossConfig
from training.config.recipe import RESPOND
from training.data.batches import IGNORED, LengthBuckets, Loader
from training.measure.monitor import DecisionMonitor
from training.model.fused_head import FusedHead
from training.model.token_losses import TokenLosses
from training.run.resume import ResumePoints, load_trained, save_trained, saved_silently

LOWER_IS_BETTER = ("loss", "calibration_error")
EVALUATION_PREFIX = "eval_"


class Rhythm(NamedTuple):
    """What happens how often, each as a share of all steps; 0 is never.

    Attributes:
        log: A line of the log.
        save: A resume point.
        evaluate: A measurement; also after the last step.
        evaluate_first: Whether there is a measurement before the first step.
    """

    log: float = 0.05
    save: float = 0.0
    evaluate: float = 0.0
    evaluate_first: bool = False


class Watch(NamedTuple):
    """What a run does besides learning.

    Attributes:
        points: Where resume points and best weights go; needed for either.
        monitor: Measures the model; None measures nothing.
        best: Which of its metrics chooses the weights that are kept; `last` chooses none.
        report_to: Where the log goes besides the checkpoint's folder.
    """

    rhythm: Rhythm
    points: ResumePoints | None = None
    monitor: DecisionMonitor | None = None
    best: str = "last"
    report_to: tuple[str, ...] = ()


class ControlTokenTrainer(SFTTrainer):
    """Trains on rows that carry a loss weight for each token.

    The loss of a step is the weighted mean over all its tokens, however many processes and
    micro-batches share it. The log tells cross-entropies, whatever the loss: `decision_loss` of the
    control tokens, `text_loss` of the others, each a plain mean over all tokens since the last
    line.

    Args:
        loss: Which flexible loss each token gets; `auto` must have been resolved.
        fused: Whether the loss is computed in chunks, without logits of the whole vocabulary.
        **options: What `SFTTrainer` takes. `train_dataset` comes from `as_dataset`, `data_collator`
            is a `Collator`.
    """

    model: Any

    def __init__(
        self,
        *,
        loss: LossConfig,
        manifest: Manifest,
        seed: int,
        fused: bool = False,
        watch: Watch,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        trainer: Any = self  # Trainer declares it without a value.
        # The loss is already divided by the weights of the whole step.
        trainer.loss_is_scaled_for_ga = True
        self._losses = TokenLosses(loss, manifest.control_ids, [*manifest.names, RESPOND])
        self._order_seed = seed
        self._fused = FusedHead(self.model) if fused else None
        self._watch = watch
        self._tally = torch.zeros(4, dtype=torch.float64)
        self.add_callback(_Conductor(watch.rhythm, evaluates=watch.monitor is not None))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Returns this process's share of the weighted mean of the step's tokens' losses.

        Args:
            inputs: What `Collator` returns.
            return_outputs: Must be false; there are no logits to return.
            num_items_in_batch: Sum of the weights of the whole step, over its micro-batches and
                processes. None: of these inputs.
        """
        if return_outputs:
            raise ValueError("the loss comes from log-probabilities; there are no outputs")
        targets = inputs["labels"][:, 1:]
        weights = inputs["weights"][:, 1:]
        total, log_probs = self._weighted_sum(model, inputs, targets, weights)
        self._note(log_probs.detach(), targets)
        if num_items_in_batch is None:
            return total / _at_least_something(weights.sum())
        # DistributedDataParallel and FSDP average gradients over processes; these are to be added.
        share: torch.Tensor = total * self.args.world_size
        return share / _at_least_something(num_items_in_batch)

    def _weighted_sum(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        targets: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the sum of weight · loss, and the `[B, T - 1]` log-probabilities."""
        q, gamma = self._losses.parameters(targets, self.state.global_step / self.state.max_steps)
        forwarded = {name: inputs[name] for name in inputs.keys() & {"input_ids", "position_ids"}}
        if self._fused is None:
            log_probs = token_log_probs(model, labels=inputs["labels"], **forwarded)
            return (_token_losses(log_probs, q, gamma) * weights).sum(), log_probs
        # The last position predicts nothing, but has to be there: the model sees whole rows.
        return self._fused(
            model,
            forwarded,
            targets=_with_last_column(targets.clamp(min=0)),
            token_weights=_with_last_column(weights),
            q=_with_last_column(q),
            gamma=_with_last_column(gamma),
        )

    def _note(self, log_probs: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds sums and counts of the cross-entropy, of decisions and of text."""
        losses = -log_probs[:, : targets.shape[1]].double()
        learnt = targets != IGNORED
        decision = learnt & self._losses.is_decision(targets)
        parts = (torch.stack([losses[m].sum(), m.sum()]) for m in (decision, learnt & ~decision))
        self._tally = self._tally.to(losses.device) + torch.cat(list(parts))

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor:
        total = sum((batch["weights"][:, 1:].sum() for batch in batch_samples), torch.zeros(()))
        summed: torch.Tensor = self.accelerator.reduce(total.to(device), reduction="sum")
        return summed

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Returns this process's micro-batches."""
        dataset: Any = self.train_dataset
        collator: Any = self.data_collator
        order = LengthBuckets(
            dataset["length"],
            self.args.train_batch_size,
            self._order_seed,
            accumulation=self.args.gradient_accumulation_steps,
            processes=self.args.world_size,
            process=self.args.process_index,
        )
        return Loader(dataset, order, collator)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the two parts of the loss to a line of the log."""
        if "loss" in logs:
            logs.update(self._mean_losses())
        if "train_loss" in logs:
            # Trainer's own knows only what this process did, not what it resumed from.
            logs["train_loss"] = _mean_loss(self.state)
        super().log(logs, start_time)

    def _mean_losses(self) -> dict[str, float]:
        tally = self.accelerator.reduce(self._tally.to(self.args.device), reduction="sum").tolist()
        self._tally = torch.zeros_like(self._tally)
        parts = {"decision_loss": tally[:2], "text_loss": tally[2:]}
        return {name: total / count for name, (total, count) in parts.items() if count}

    def evaluate(self, *_args: Any, **_options: Any) -> dict[str, float]:
        """Measures the model with the monitor, and keeps its weights where they are the best.

        Nothing that the training goes on with is changed, random states included.

        Returns:
            The monitor's metrics, each with the prefix `eval_`.
        """
        monitor, best = self._watch.monitor, self._watch.best
        assert monitor is not None
        with _undisturbed():
            metrics = monitor.measure(self.model).metrics
        logs = {f"{EVALUATION_PREFIX}{name}": value for name, value in metrics.items()}
        self.log(dict(logs))
        if best != "last" and self.state.global_step > 0:
            self._keep_if_best(metrics[best])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _keep_if_best(self, value: float) -> None:
        known = self.state.best_metric
        better = known is None or (
            value < known if self._watch.best in LOWER_IS_BETTER else value > known
        )
        if not better:
            return
        self.state.best_metric = value
        self.state.best_global_step = self.state.global_step
        points = self._known_points()
        written = points.scratch / "best"
        save_trained(self, written)
        if self.is_world_process_zero():
            points.commit_best(written, self.state.global_step)
        self.accelerator.wait_for_everyone()

    def load_best(self) -> int | None:
        """Puts the best weights back into the model.

        Returns:
            The step that reached them; None where the last weights are kept.
        """
        step: int | None = self.state.best_global_step
        if step is None:
            return None
        load_trained(self, self._known_points().best(step))
        return step

    def _known_points(self) -> ResumePoints:
        if self._watch.points is None:
            raise ValueError("resume points and best weights need a place: pass watch.points")
        return self._watch.points

    def _get_output_dir(self, trial: Any) -> str:
        points = self._watch.points
        return str(points.scratch if points else self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        points = self._known_points()
        # Not SFTTrainer's: it writes a model card into the checkpoint.
        with saved_silently():
            Trainer._save_checkpoint(self, model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            points.commit(self.state.global_step, self.state.best_global_step)
        self.accelerator.wait_for_everyone()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # What shares a tensor with another is saved once, and not missing.
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        load_result.missing_keys[:] = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result)

    def _run_epoch(self, *values: Any, **options: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # Resumed after the last step: Trainer would look at that only after one step more.
            self.control.should_training_stop = True
            return
        epoch: Any = super()._run_epoch
        epoch(*values, **options)


class _Conductor(TrainerCallback):
    """Says at which steps something is logged, measured and saved."""

    def __init__(self, rhythm: Rhythm, *, evaluates: bool) -> None:
        self._rhythm = rhythm
        self._evaluates = evaluates

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_options: Any,
    ) -> TrainerControl:
        step, last = state.global_step, state.global_step >= state.max_steps
        save = self._rhythm.save > 0 and (last or _falls_on(step, self._rhythm.save, state))
        control.should_save = save
        # What is saved is saved between two lines of the log: sums need not be.
        control.should_log = save or last or _falls_on(step, self._rhythm.log, state)
        control.should_evaluate = self._evaluates and (
            last or _falls_on(step, self._rhythm.evaluate, state)
        )
        return control


def _falls_on(step: int, share: float, state: TrainerState) -> bool:
    return share > 0 and step % max(1, math.ceil(share * state.max_steps)) == 0


def token_log_probs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the log-probability of each next token that has a label.

    Args:
        input_ids: `[B, T]` int64, padded on the right, so that no token attends to padding.
        labels: `[B, T]` int64, `IGNORED` where nothing is learnt.
        position_ids: `[B, T]` int64 where sequences hold several rows; each row starts from 0.

    Returns:
        `[B, T - 1]` fp32, 0 where the next token has no label.
    """
    targets = labels[:, 1:]
    learnt = targets != IGNORED
    first = int(learnt.any(dim=0).int().argmax())
    placed = {} if position_ids is None else {"position_ids": position_ids}
    logits = model(
        input_ids=input_ids, logits_to_keep=input_ids.shape[1] - first, use_cache=False, **placed
    ).logits[:, :-1]
    chosen = learnt[:, first:]
    losses = torch.nn.functional.cross_entropy(
        logits[chosen].float(), targets[:, first:][chosen], reduction="none"
    )
    return torch.zeros(targets.shape, device=losses.device).masked_scatter(learnt, -losses)


def _token_losses(
    log_probs: torch.Tensor, q: float | torch.Tensor, gamma: float | torch.Tensor
) -> torch.Tensor:
    # Exactly cross-entropy, without the powers that come to 1.
    plain = isinstance(q, float) and isinstance(gamma, float) and q == gamma == 0.0
    return -log_probs if plain else flexible_loss(log_probs, q, gamma)


def _with_last_column(value: Any) -> Any:
    return torch.nn.functional.pad(value, (0, 1)) if isinstance(value, torch.Tensor) else value


def _at_least_something(total: torch.Tensor | float) -> torch.Tensor:
    total = torch.as_tensor(total)
    return torch.where(total > 0, total, torch.ones_like(total))


def _mean_loss(state: TrainerState) -> float:
    total, done = 0.0, 0.0
    for line in state.log_history:
        if "loss" in line:
            total += line["loss"] * (line["step"] - done)
            done = line["step"]
    return total / max(done, 1)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Puts every random state back."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
