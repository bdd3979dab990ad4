"""How long a training will take, before it starts."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from models.errors import CheckpointError
from training.config.loss import LossConfig
from training.config.recipe import OptimisationConfig, ScratchModel, TrainConfig
from training.data.encoding import Example
from training.model.start import Start

MEASURED_PARAMETERS = 50_000_000
WARM_UP_STEPS = 2
FEWEST_STEPS = 3
MOST_STEPS = 12
ENOUGH_S = 8.0
LONGEST_S = 30.0

# What one GPU sustains: 40 % of the 312 TFLOP/s of an A100 in bfloat16 (NVIDIA's data sheet).
ASSUMED_FLOPS = 1.25e14
ASSUMPTION = "assuming one GPU that sustains 125 TFLOP/s, an A100 at 40 %"


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


class Estimate(NamedTuple):
    """How long it takes.

    Attributes:
        seconds: Of training, without reading data and without measurements on the way.
        basis: What that rests on.
    """

    seconds: float
    basis: str


def work(examples: Sequence[Example], optimisation: OptimisationConfig) -> Work:
    """Returns what a training on these examples has to do."""
    sequences = len(examples)
    if optimisation.packing:
        from training.data.batches import as_packed_dataset

        sequences = len(as_packed_dataset(examples, optimisation.max_length))
    step_size = optimisation.batch_size * optimisation.gradient_accumulation_steps
    return Work(
        tokens=sum(len(example.input_ids) for example in examples),
        learnt=sum(weight > 0 for example in examples for weight in example.weights),
        sequences=sequences,
        steps=max(1, round(-(-sequences // step_size) * optimisation.epochs)),
    )


def measured(
    config: TrainConfig, start: Start, examples: Sequence[Example], done: Work
) -> Estimate:
    """Takes a few real steps in a folder that vanishes, and extrapolates by their tokens.

    Args:
        config: The recipe.
        start: What it begins with.
        examples: What is learnt from.
        done: What the training has to do.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from training.run.assembly import SILENT, assemble, memory_told

    with TemporaryDirectory() as folder, memory_told():
        trainer = assemble(config, start, examples, _without_auto(config), Path(folder), SILENT)
        trainer.args.include_num_input_tokens_seen = "all"
        for talkative in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(talkative)
        clock = _clock()
        trainer.add_callback(clock)
        trainer.train()
    device = "GPU" if trainer.args.device.type != "cpu" else "CPU"
    return Estimate(
        clock.seconds_a_token() * done.tokens * config.optimisation.epochs,
        f"measured: {clock.steps} steps on this machine's {device}, as busy as it is now",
    )


def _without_auto(config: TrainConfig) -> LossConfig:
    decision = config.loss.decision
    if "auto" not in (decision.q, decision.gamma):
        return config.loss
    plain = decision.model_copy(update={"q": 0.0, "gamma": 0.0})
    return config.loss.model_copy(update={"decision": plain})


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times the steps after the first ones, and ends the training after a few of them."""

        def __init__(self) -> None:
            self._marks: list[tuple[float, int]] = []

        @property
        def _first(self) -> int:
            # The first steps also import, allocate and warm up.
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
            warm = len(self._marks) > WARM_UP_STEPS + FEWEST_STEPS
            control.should_training_stop = (
                self.steps >= MOST_STEPS or (warm and spent > ENOUGH_S) or spent > LONGEST_S
            )

    return Clock()


def assumed(config: TrainConfig, parameters: int, done: Work) -> Estimate:
    """Estimates from the number of parameters, at 6 operations a parameter and token.

    Two of them are the forward pass, four the backward pass; adapters leave out the two that make
    gradients of the frozen weights, gradient checkpointing adds a second forward pass.
    Source: Kaplan et al. 2020 (arXiv 2001.08361), section 2.1.

    Args:
        config: The recipe.
        parameters: Of the model.
        done: What the training has to do.
    """
    operations = 6 - 2 * (config.lora is not None) + 2 * config.optimisation.gradient_checkpointing
    tokens = done.tokens * config.optimisation.epochs
    return Estimate(
        operations * parameters * tokens / ASSUMED_FLOPS,
        f"not measured: {parameters / 1e9:.2g} billion parameters, {ASSUMPTION}",
    )


def described(folder: Path) -> Any:
    """Returns the configuration of an existing model; its weights need not be there.

    Args:
        folder: Where its config.json is.

    Raises:
        CheckpointError: It is none that can be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unloadable(folder, error) from error


def parameters(folder: Path) -> int:
    """Counts the parameters of an existing model from its configuration alone.

    Args:
        folder: Where its config.json is.

    Raises:
        CheckpointError: It is no configuration of a model that can be trained here.
    """
    import torch
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            model = build(described(folder))
    except (OSError, ValueError) as error:
        raise _unloadable(folder, error) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _unloadable(folder: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0]
    return CheckpointError(f"{folder}: the model cannot be loaded: {reason}")


def is_cheap(config: TrainConfig, folder: Path | None) -> bool:
    """Tells whether steps of the real model can be taken while someone waits.

    Args:
        config: The recipe.
        folder: Where an existing model lies with its weights; None where they are not here.
    """
    if isinstance(config.model, ScratchModel):
        return True
    return folder is not None and parameters(folder) <= MEASURED_PARAMETERS
