"""Trains a checkpoint from a recipe."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.checkpoint import load_checkpoint, load_tokenizer, resolve_checkpoint
from models.errors import CheckpointError, ConfigError
from models.manifest import MANIFEST_NAME, Manifest, Recipe, load_manifest, save_manifest
from models.tokens import RESPOND, add_control_tokens, grow_embeddings, refusal_token
from training.config import DEMO, CheckpointModel, ScratchModel, TrainConfig
from training.data import DecisionWeights, Row, encode_rows, read_rows
from training.scratch import new_model, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from training.trainer import ControlTokenTrainer

DEMO_DATA = "demo_data"
LOSS = "cross_entropy"


class Start(NamedTuple):
    """What the training begins with.

    Attributes:
        model: With a row for every control token.
        tokenizer: With the control tokens.
        manifest: Of the control tokens; without a recipe.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    manifest: Manifest


class DataFile(NamedTuple):
    """A training file.

    Attributes:
        name: As the recipe calls it.
        path: Where it lies.
    """

    name: str
    path: Path


def train(
    config: TrainConfig, out: Path, *, force: bool = False, replace_stale: bool = False
) -> Path:
    """Trains a checkpoint that can be served.

    Everything is written to a folder beside `out` that takes its name at the very end, so a
    folder called `out` is always a finished checkpoint.

    Args:
        config: The recipe.
        out: The checkpoint's folder. A checkpoint that lies there already and was made from the
            same recipe and data is kept as it is.
        force: Whether to train again and replace a checkpoint that lies there.
        replace_stale: Whether to replace one of another recipe or other data, and keep one of
            this recipe.

    Returns:
        `out`.

    Raises:
        ConfigError: The data are wrong, or something else lies at `out`.
        CheckpointError: The model to start from cannot be loaded or could not be served.
    """
    _refuse_foreign_folder(out)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    data = _data_files(config, partial)
    recipe = _recipe(config, data)
    if out.exists() and not force:
        fresh = _is_made_from(out, recipe)
        if fresh or not replace_stale:
            shutil.rmtree(partial)
        if fresh:
            return out
        if not replace_stale:
            raise ConfigError(
                f"{out}: holds a checkpoint of another recipe or other data; choose another place, "
                "or replace it with --force"
            )
    _train_into(partial, config, recipe, data)
    _put_in_place(partial, out)
    return out


def _train_into(
    folder: Path, config: TrainConfig, recipe: Recipe, data: Sequence[DataFile]
) -> None:
    seconds: dict[str, float] = {}
    with _timed(seconds, "data_s"):
        rows = [row for file in data for row in read_rows(file.path, config.categories)]
    with _timed(seconds, "model_s"):
        start = _start(config, rows)
        _write_contract(folder, config, recipe, start)
        # Before the training as well as after it: what could not be served is not trained.
        load_checkpoint(folder)
    with _timed(seconds, "trainer_s"):
        trainer = _trainer(config, rows, start, folder)
    with _timed(seconds, "training_s"):
        trainer.train()
    with _timed(seconds, "saving_s"):
        _save_weights(trainer, folder)
        load_checkpoint(folder)
    _write_log(folder, [*trainer.state.log_history, seconds])


def _refuse_foreign_folder(out: Path) -> None:
    if out.exists() and not (out / MANIFEST_NAME).is_file():
        raise ConfigError(f"{out}: exists and is not a checkpoint of ours; choose another place")


def _is_made_from(out: Path, recipe: Recipe) -> bool:
    try:
        made = load_manifest(out).recipe
    except CheckpointError:
        return False
    return made is not None and (made.config_sha256, made.data_sha256) == (
        recipe.config_sha256,
        recipe.data_sha256,
    )


def _data_files(config: TrainConfig, folder: Path) -> list[DataFile]:
    if config.data.train != DEMO:
        return [DataFile(name, Path(name)) for name in config.data.train]
    from training.demo_data.render import write

    write(folder / DEMO_DATA, config.data.seed)
    return [DataFile(f"{DEMO_DATA}/train.jsonl", folder / DEMO_DATA / "train.jsonl")]


def _recipe(config: TrainConfig, data: Sequence[DataFile]) -> Recipe:
    try:
        hashes = {file.name: hashlib.sha256(file.path.read_bytes()).hexdigest() for file in data}
    except OSError as error:
        raise ConfigError(
            f"data.train: {error.filename} cannot be read: {error.strerror}"
        ) from error
    return Recipe(config_sha256=config.sha256(), data_sha256=hashes, loss=LOSS, seed=config.seed)


def _start(config: TrainConfig, rows: Sequence[Row]) -> Start:
    if isinstance(config.model, ScratchModel):
        return _start_from_scratch(config, config.model, rows)
    return _start_from_checkpoint(config, config.model)


def _start_from_scratch(config: TrainConfig, model: ScratchModel, rows: Sequence[Row]) -> Start:
    controls = {RESPOND, *map(refusal_token, config.categories)}
    tokenizer = train_tokenizer(
        (turn.content for row in rows for turn in row.messages),
        model.vocab_size - len(controls),
        model.max_length,
    )
    manifest = add_control_tokens(tokenizer, config.categories)
    return Start(new_model(model, tokenizer, config.seed), tokenizer, manifest)


def _start_from_checkpoint(config: TrainConfig, source: CheckpointModel) -> Start:
    from transformers import AutoModelForCausalLM

    folder = resolve_checkpoint(source.checkpoint, source.revision)
    tokenizer = load_tokenizer(folder)
    manifest = add_control_tokens(tokenizer, config.categories)
    try:
        # AdamW in bfloat16 loses small updates; bf16 training is autocast over fp32 weights.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="float32", local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: the model cannot be loaded: {reason}") from error
    grow_embeddings(model, tokenizer, manifest)
    return Start(model, tokenizer, manifest)


def _write_contract(folder: Path, config: TrainConfig, recipe: Recipe, start: Start) -> None:
    categories = tuple(
        category.model_copy(update={"refusal_text": config.refusal_text(category.name)})
        for category in start.manifest.categories
    )
    start.model.config.save_pretrained(folder)
    start.tokenizer.save_pretrained(folder)
    (folder / "resolved_config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    save_manifest(
        folder, start.manifest.model_copy(update={"categories": categories, "recipe": recipe})
    )


def _trainer(
    config: TrainConfig, rows: Sequence[Row], start: Start, folder: Path
) -> "ControlTokenTrainer":
    from training.trainer import Collator, ControlTokenTrainer, as_dataset

    tokenizer = start.tokenizer
    examples = encode_rows(
        rows,
        tokenizer,
        start.manifest,
        DecisionWeights(config.decision_weight, config.pair_decision_weight),
        config.optimisation.max_length,
    )
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return ControlTokenTrainer(
        control_ids=start.manifest.control_ids,
        seed=config.seed,
        model=start.model,
        args=_arguments(config, folder),
        train_dataset=as_dataset(examples),
        data_collator=Collator(pad_id or 0),
        processing_class=tokenizer,
    )


def _arguments(config: TrainConfig, folder: Path) -> Any:
    from trl.trainer.sft_config import SFTConfig

    chosen = config.optimisation
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=chosen.epochs,
        per_device_train_batch_size=chosen.batch_size,
        gradient_accumulation_steps=chosen.gradient_accumulation_steps,
        learning_rate=chosen.learning_rate,
        warmup_steps=chosen.warmup_ratio,
        weight_decay=chosen.weight_decay,
        adam_beta2=chosen.beta2,
        max_grad_norm=chosen.max_grad_norm,
        lr_scheduler_type=chosen.scheduler,
        bf16=chosen.bf16,
        gradient_checkpointing=chosen.gradient_checkpointing,
        seed=config.seed,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_steps=0.05,
        save_strategy="no",
        report_to="none",
    )


def _save_weights(trainer: "ControlTokenTrainer", folder: Path) -> None:
    # Off for the training; kept so, whoever loads the checkpoint would generate without a cache.
    model: Any = trainer.model
    model.config.use_cache = True
    trainer.save_model(str(folder))
    # A pickle of the trainer's arguments; resolved_config.yaml says the same without code in it.
    (folder / "training_args.bin").unlink(missing_ok=True)


def _write_log(folder: Path, entries: Sequence[dict[str, Any]]) -> None:
    lines = (json.dumps(entry) + "\n" for entry in entries)
    (folder / "training_log.jsonl").write_text("".join(lines), encoding="utf-8")


def _put_in_place(partial: Path, out: Path) -> None:
    replaced = out.with_name(f"{out.name}.replaced")
    if replaced.exists():
        shutil.rmtree(replaced)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    if replaced.exists():
        shutil.rmtree(replaced)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - began, 2)
