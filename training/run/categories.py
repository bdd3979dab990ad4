"""Adds a category to a trained checkpoint, or removes one; no other decision changes."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from models.calibration import CALIBRATIONS
from models.checkpoint import load_checkpoint
from models.errors import CheckpointError, ConfigError
from models.files import write_atomically
from models.manifest import Category, ControlToken, Manifest, load_manifest, save_manifest
from models.tokens import grow_embeddings, refusal_token, single_id
from training.config.data import DataConfig, Source
from training.config.recipe import ANSWERS
from training.data.encoding import DecisionWeights, encode_rows
from training.data.mixture import gather
from training.model.output_rows import delete_row, on_device, output_rows, set_row
from training.model.start import load_model, stored_dtype
from training.model.token_rows import FOLDS, Decisions, fit_one
from training.run.folder import locked, put_in_place
from training.run.kept_states import keep_states, kept_states
from training.run.tokens import decisions_of, save_model


class Added(NamedTuple):
    """What a new category was learnt from, and what it is worth.

    Attributes:
        prompts: How many were its own.
        refused: Share of them that it refuses with its dial at the default, each counted by rows
            that were learnt without it.
        others_refused: The same of all other prompts that it was learnt from.
        calibrations: How many were removed, because they hold for the old weights.
    """

    prompts: int
    refused: float
    others_refused: float
    calibrations: int


def add_category(
    checkpoint: Path, wanted: Category, sources: Sequence[Source], seed: int = 0
) -> Added:
    """Learns the row of one more category; all other rows, and so their margins, stay.

    Args:
        checkpoint: The folder of a checkpoint of `train: tokens`. It is replaced when all is done.
        wanted: The category; its id is not looked at.
        sources: Prompts of the category, and others if there are.
        seed: Of the folds of the cross-validation.

    Raises:
        CheckpointError: The checkpoint cannot be loaded, or keeps its tokens in the context.
        ConfigError: The category is there, or the data are wrong or too few.
    """
    with _changing(checkpoint) as partial:
        manifest, tokenizer = load_checkpoint(checkpoint)
        _check_new(manifest, wanted.name)
        grown = _grown(manifest, tokenizer, wanted)
        rows = gather(DataConfig(train=tuple(sources)), grown.names).rows
        _check_enough(wanted.name, sum(row.category == wanted.name for row in rows))
        examples = encode_rows(rows, tokenizer, grown, DecisionWeights(1.0, 1.0), None)
        model = on_device(load_model(checkpoint, "float32"))
        decisions = _beside(
            kept_states(checkpoint, grown.names),
            decisions_of(examples, grown, model),
            len(manifest.names),
        )
        own = decisions.labels == len(manifest.names)
        old = output_rows(model, [category.id for category in manifest.categories])
        labelled = decisions._replace(labels=np.where(own, 0, 1))
        fitted = fit_one(labelled, decisions.states @ old.T, seed)
        grow_embeddings(model, tokenizer, grown)
        set_row(model, grown.categories[-1].id, fitted.rows[0])
        _save(partial, model, stored_dtype(checkpoint), tokenizer, grown)
        keep_states(partial, decisions, grown.names)
        lost = _calibrations(checkpoint)
    refused = fitted.held_out[:, 0] >= 0
    return Added(int(own.sum()), float(refused[own].mean()), float(refused[~own].mean()), lost)


def remove_category(checkpoint: Path, name: str) -> int:
    """Removes a category, its token and its row; all other rows, and so their margins, stay.

    Args:
        checkpoint: As in `add_category`.
        name: The category's.

    Returns:
        How many calibrations were removed, because they hold for the old weights.

    Raises:
        CheckpointError: The checkpoint cannot be loaded, or keeps its tokens in the context.
        ConfigError: There is no such category, or no other.
    """
    with _changing(checkpoint) as partial:
        manifest, tokenizer = load_checkpoint(checkpoint)
        if name not in manifest.names:
            known = ", ".join(manifest.names)
            raise ConfigError(f"{checkpoint}: has no category {name!r}; it has {known}")
        if len(manifest.categories) == 1:
            raise ConfigError(f"{checkpoint}: {name} is its only category")
        gone = manifest.categories[manifest.names.index(name)]
        _check_last(checkpoint, tokenizer, manifest)
        dtype = stored_dtype(checkpoint)
        model = load_model(checkpoint, dtype)
        delete_row(model, gone.id)
        shrunk = _shrunk(manifest, gone)
        _save(partial, model, dtype, tokenizer, shrunk)
        _delete_token(partial, gone)
        decisions = kept_states(checkpoint, shrunk.names)
        if decisions is not None:
            keep_states(partial, decisions, shrunk.names)
        return _calibrations(checkpoint)


@contextmanager
def _changing(checkpoint: Path) -> Iterator[Path]:
    """Gives a copy without weights and calibrations, which takes the checkpoint's place."""
    partial = checkpoint.with_name(f"{checkpoint.name}.changing")
    with locked(checkpoint):
        if load_manifest(checkpoint).kept:
            raise CheckpointError(
                f"{checkpoint}: keeps its control tokens in the context, so the text that follows "
                "a new one would have to be learnt too; train it with the category, or start from "
                "a checkpoint of `train: tokens`"
            )
        if checkpoint.is_symlink():
            raise ConfigError(f"{checkpoint}: is a symbolic link; name the folder itself")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            shutil.copytree(checkpoint, partial, ignore=_left_out(checkpoint))
            yield partial
            load_checkpoint(partial)
            put_in_place(partial, checkpoint)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _left_out(checkpoint: Path) -> Any:
    def names(folder: str, found: list[str]) -> set[str]:
        if Path(folder) != checkpoint:
            return set()
        return {CALIBRATIONS, *(name for name in found if name.endswith(".safetensors"))}

    return names


def _calibrations(checkpoint: Path) -> int:
    return len(list((checkpoint / CALIBRATIONS).glob("*.safetensors")))


def _grown(manifest: Manifest, tokenizer: Any, wanted: Category) -> Manifest:
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [wanted.token]}, replace_extra_special_tokens=False
    )
    category = wanted.model_copy(update={"id": single_id(tokenizer, wanted.token)})
    return manifest.model_copy(update={"categories": (*manifest.categories, category)})


def _shrunk(manifest: Manifest, gone: Category) -> Manifest:
    def moved(token: ControlToken) -> ControlToken:
        return token.model_copy(update={"id": token.id - (token.id > gone.id)})

    left = tuple(moved(category) for category in manifest.categories if category is not gone)
    return manifest.model_copy(update={"categories": left, "respond": moved(manifest.respond)})


def _beside(known: Decisions | None, fresh: Decisions, column: int) -> Decisions:
    """Puts new decisions beside those that the other rows were learnt from.

    The new category then weighs in sum as much as the others do on average: how many prompts of it
    were written says nothing of how often it is asked for.
    """
    if known is None:
        return fresh
    own = fresh.labels == column
    others = known.weights[known.labels < column].sum() / column
    weights = np.where(own, others / max(own.sum(), 1), fresh.weights)
    pairs = zip(known, fresh._replace(weights=weights), strict=True)
    return Decisions(*(np.concatenate(pair) for pair in pairs))


def _save(partial: Path, model: Any, dtype: str, tokenizer: Any, manifest: Manifest) -> None:
    save_model(model, dtype, partial)
    tokenizer.save_pretrained(partial)
    save_manifest(partial, manifest)


def _check_last(checkpoint: Path, tokenizer: Any, manifest: Manifest) -> None:
    """Checks that only control tokens move when one of them goes."""
    first = min(manifest.control_ids)
    if sorted(manifest.control_ids) != list(range(first, len(tokenizer))):
        raise CheckpointError(
            f"{checkpoint}: the tokenizer has other tokens behind or between its control tokens; "
            "they would get other ids"
        )


def _delete_token(folder: Path, gone: Category) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    left = [entry for entry in content["added_tokens"] if entry["id"] != gone.id]
    for entry in left:
        entry["id"] -= entry["id"] > gone.id
    write_atomically(path, json.dumps({**content, "added_tokens": left}, ensure_ascii=False))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_bytes())
    for field in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(config.get(field), list):
            config[field] = [token for token in config[field] if token != gone.token]
    write_atomically(path, json.dumps(config, indent=2, ensure_ascii=False))


def _check_new(manifest: Manifest, name: str) -> None:
    if name in ANSWERS:
        raise ConfigError(f"{name} is what the answers are called; choose another name")
    if name in manifest.names:
        raise ConfigError(f"the checkpoint has a category {name} already")


def _check_enough(name: str, count: int) -> None:
    if count < FOLDS:
        raise ConfigError(
            f"--data: {count} of its rows have the category {name}, and {FOLDS} are the least; a "
            f"file without that column is named by a .yaml list: - {{path: FILE, category: {name}}}"
        )


def new_category(name: str, description: str, refusal_text: str | None) -> Category:
    """Returns a category whose token has no id yet.

    Raises:
        ConfigError: The name or the text is none.
    """
    told = {} if refusal_text is None else {"refusal_text": refusal_text}
    try:
        return Category(name=name, token=refusal_token(name), id=0, description=description, **told)
    except ValidationError as error:
        raise ConfigError(f"--name {name}: {error.errors()[0]['msg']}") from error
