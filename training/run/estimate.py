"""How long a training takes: a few real steps and batches of a measurement, timed."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from training.config.recipe import EvaluationConfig, OptimisationConfig, TrainConfig
from training.data.batches import as_dataset
from training.data.encoding import Example
from training.measure.monitor import DecisionMonitor
from training.model.start import Start
from training.run.assembly import SILENT, assemble, memory_errors_explained
from training.run.auto import STANDARD, is_auto, with_choice

# The first steps also import, allocate and warm up: on a tiny model they are twenty times as slow.
WARM_UP_STEPS = 2
FEWEST_STEPS, MOST_STEPS = 3, 12
ENOUGH_S, LONGEST_S = 8.0, 30.0


class Work(NamedTuple):
    """What a training has to do.

    Attributes:
        tokens: In one pass over the data.
        learnt: Of them, those with a loss weight.
        sequences: What the batches are made of: rows, or rows packed together.
        steps: In all, on one process.
    """

    tokens: int
    learnt: int
    sequences: int
    steps: int


class Timing(NamedTuple):
    """How long a training takes on this machine.

    Attributes:
        steps: How many steps were timed.
        training_s: All steps, extrapolated by their tokens.
        measurement_s: One measurement of the held-out rows; None where the recipe has none.
        measurements: How many there are, the first and the last included.
        device: Where the steps were taken.
    """

    steps: int
    training_s: float
    measurement_s: float | None
    measurements: int
    device: str


def work(examples: Sequence[Example], optimisation: OptimisationConfig) -> Work:
    """Returns what a training on these examples has to do."""
    sequences = len(examples)
    if optimisation.packing:
        sequences = len(as_dataset(examples, optimisation.max_length))
    step_size = optimisation.batch_size * optimisation.gradient_accumulation_steps
    return Work(
        tokens=sum(len(example.input_ids) for example in examples),
        learnt=sum(weight > 0 for example in examples for weight in example.weights),
        sequences=sequences,
        steps=max(1, round(-(-sequences // step_size) * optimisation.epochs)),
    )


def timed(
    config: TrainConfig,
    start: Start,
    examples: Sequence[Example],
    monitor: DecisionMonitor | None,
) -> Timing:
    """Takes a few real steps in a folder that vanishes, and measures two batches.

    Raises:
        ConfigError: The model or a step does not fit into this machine's memory.
    """
    loss = with_choice(config.loss, STANDARD) if is_auto(config.loss) else config.loss
    with TemporaryDirectory() as folder, memory_errors_explained():
        trainer = assemble(config, start, examples, loss, Path(folder), SILENT)
        trainer.args.include_num_input_tokens_seen = "all"
        for talkative in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(talkative)
        clock = _Clock()
        trainer.add_callback(clock)
        trainer.train()
        measurement_s = None if monitor is None else monitor.seconds(trainer.model)
    done = work(examples, config.optimisation)
    return Timing(
        steps=clock.steps,
        training_s=clock.seconds_a_token() * done.tokens * config.optimisation.epochs,
        measurement_s=measurement_s,
        measurements=_measurements(config.evaluation, done.steps),
        device="GPU" if trainer.args.device.type != "cpu" else "CPU",
    )


def _measurements(evaluation: EvaluationConfig | None, steps: int) -> int:
    if evaluation is None:
        return 0
    between = max(1, -(-evaluation.every * steps // 1))
    # Once more at the very end: of the weights that are exported.
    return int(evaluation.at_start) + int(-(-steps // between)) + 1


class _Clock(TrainerCallback):
    """Times a few steps, more of quick ones, and then ends the training."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    @property
    def _first(self) -> int:
        return min(WARM_UP_STEPS, len(self._marks) - 2)

    @property
    def steps(self) -> int:
        return len(self._marks) - 1 - self._first

    def seconds_a_token(self) -> float:
        first, last = self._marks[self._first], self._marks[-1]
        return (last[0] - first[0]) / max(last[1] - first[1], 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks.append((time.perf_counter(), 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._marks.append((time.perf_counter(), int(state.num_input_tokens_seen)))
        spent = self._marks[-1][0] - self._marks[0][0]
        enough = self.steps >= FEWEST_STEPS and spent > ENOUGH_S
        control.should_training_stop = enough or self.steps >= MOST_STEPS or spent > LONGEST_S
