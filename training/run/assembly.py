"""From a recipe to a trainer: the model with its adapters, the batches, the arguments."""

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from trl.trainer.sft_config import SFTConfig

from models.errors import ConfigError
from training.config.loss import LossConfig
from training.config.recipe import OptimisationConfig, TrainConfig
from training.data.batches import Collator, as_dataset
from training.data.encoding import Example
from training.measure.sequences import padding_id
from training.model.fused_head import supports
from training.model.lora import add_adapters
from training.model.start import Start
from training.run.trainer import ControlTokenTrainer, Rhythm, Watch

FUSED_FROM_VOCABULARY = 16_384
TENSORBOARD_FOLDER = "tensorboard"
# Of logits, relative and absolute.
PACKING_TOLERANCE = 1e-3


SILENT = Watch(Rhythm(log=0.0))


def assemble(
    config: TrainConfig,
    start: Start,
    examples: Sequence[Example],
    loss: LossConfig,
    folder: Path,
    watch: Watch,
    *,
    share: float = 1.0,
) -> ControlTokenTrainer:
    """Returns the trainer of a recipe, with a model of its own.

    Args:
        loss: The recipe's losses, without `auto`.
        share: Share of the recipe's steps that is trained, as a training of its own.

    Raises:
        ConfigError: The recipe asks for what this model or this machine cannot do.
    """
    chosen = config.optimisation
    model = _model(config, start)
    dataset = as_dataset(examples, chosen.max_length if chosen.packing else 0)
    arguments = _arguments(config, folder, watch)
    steps = _steps(len(dataset), chosen, arguments.world_size)
    arguments.max_steps = max(1, round(steps * share)) if share < 1 else steps
    with _wandb_errors_explained():
        trainer = ControlTokenTrainer(
            loss=loss,
            manifest=start.manifest,
            seed=config.seed,
            fused=_wants_fused_head(chosen, start, model),
            watch=watch,
            model=model,
            args=arguments,
            train_dataset=dataset,
            data_collator=Collator(padding_id(start.tokenizer), packed=chosen.packing),
            processing_class=start.tokenizer,
            callbacks=_reporters(folder, watch, arguments),
        )
    if config.lora is not None and trainer.is_fsdp_enabled:
        raise ConfigError(
            "lora: the control tokens' rows cannot be trained beside a sharded vocabulary; launch "
            "without FSDP, each process then holds the whole model"
        )
    return trainer


def _model(config: TrainConfig, start: Start) -> Any:
    model = start.make()
    if config.optimisation.packing:
        check_packing(model)
    # Adapters begin at random.
    set_seed(config.seed)
    return model if config.lora is None else add_adapters(model, config.lora, start.manifest)


def check_packing(model: Any) -> None:
    """Checks what packing needs: that positions which start again start another row.

    Attention does that in transformers; recurrent layers, sliding caches or a model that takes no
    positions may not, and would then learn to continue what another row said.

    Raises:
        ConfigError: A row changes what the model says about the row behind it.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    row = [token % vocabulary for token in (11, 17, 23, 29)]
    others = [[token % vocabulary for token in other] for other in ((5, 7, 3), (2, 13, 19))]
    positions = [0, 1, 2, 0, 1, 2, 3]
    device = next(model.parameters()).device
    with torch.no_grad():
        first, second = (
            model(
                input_ids=torch.tensor([[*other, *row]], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
            ).logits[0, 3:]
            for other in others
        )
    if not torch.allclose(
        first.float(), second.float(), rtol=PACKING_TOLERANCE, atol=PACKING_TOLERANCE
    ):
        raise ConfigError(
            f"optimisation.packing: {type(model).__name__} lets rows that share a sequence see "
            "each other; set it to false"
        )


def _steps(rows: int, chosen: OptimisationConfig, processes: int) -> int:
    if not rows:
        raise ConfigError("data.train: no row is left: all are longer than optimisation.max_length")
    step_size = chosen.batch_size * chosen.gradient_accumulation_steps * processes
    return max(1, round(-(-rows // step_size) * chosen.epochs))


def _wants_fused_head(chosen: OptimisationConfig, start: Start, model: Any) -> bool:
    if chosen.fused_head != "auto":
        return chosen.fused_head
    return len(start.tokenizer) >= FUSED_FROM_VOCABULARY and supports(model) is None


def _arguments(config: TrainConfig, folder: Path, watch: Watch) -> SFTConfig:
    chosen = config.optimisation
    try:
        return SFTConfig(
            output_dir=str(folder),
            num_train_epochs=chosen.epochs,
            per_device_train_batch_size=chosen.batch_size,
            gradient_accumulation_steps=chosen.gradient_accumulation_steps,
            learning_rate=chosen.learning_rate,
            # Below 1 it is a share of all steps.
            warmup_steps=chosen.warmup_ratio,
            weight_decay=chosen.weight_decay,
            adam_beta2=chosen.beta2,
            max_grad_norm=chosen.max_grad_norm,
            lr_scheduler_type=chosen.scheduler,
            use_cpu=not torch.accelerator.is_available(),
            bf16=chosen.bf16,
            gradient_checkpointing=chosen.gradient_checkpointing,
            seed=config.seed,
            # The rows are encoded, weighed and cut already, and `weights` is no input of the model.
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            # All trained parameters take part in every step; looking for others costs a pass.
            ddp_find_unused_parameters=False,
            # `Rhythm` says when, so that what is saved is saved between two lines of the log.
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            eval_on_start=watch.monitor is not None and watch.rhythm.evaluate_first,
            run_name=config.name,
            report_to=[name for name in watch.report_to if name != "tensorboard"] or "none",
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"optimisation: this machine cannot do it: {reason}") from error


def _reporters(folder: Path, watch: Watch, arguments: SFTConfig) -> list[TrainerCallback]:
    for name in watch.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: {name} is not installed; `pip install {name}`")
    if "tensorboard" not in watch.report_to or arguments.process_index > 0:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers import integrations

    make: Any = SummaryWriter
    report: Any = integrations
    writer = make(log_dir=str(folder / TENSORBOARD_FOLDER))
    return [report.TensorBoardCallback(tb_writer=writer)]


@contextmanager
def _wandb_errors_explained() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "wandb":
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"report_to: wandb: {reason}; run `wandb login`, or set WANDB_MODE=offline"
        ) from error


@contextmanager
def memory_errors_explained() -> Iterator[None]:
    """Turns running out of memory into one line that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        shortage = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not shortage and "allocate memory" not in str(error):
            raise
        raise ConfigError(
            "out of memory: lower optimisation.batch_size and raise gradient_accumulation_steps by "
            "as much, set gradient_checkpointing: true, lower max_length, or train with lora"
        ) from error
