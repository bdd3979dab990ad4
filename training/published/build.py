"""A published checkpoint: built from its base and what a training changed, and written as such.

    python -m training.published.build CHECKPOINT training/published/NAME

writes what `build` reads of a checkpoint of `train: lora` or `train: tokens`: adapters in half
precision, the control tokens' rows, `rheostat.json`. Calibrations belong to the built weights:
build, calibrate, and copy them here. The card is written by hand.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.calibration import CALIBRATIONS, list_calibrations, load_calibration, verify
from models.checkpoint import load_checkpoint
from models.errors import CheckpointError, ConfigError
from models.files import write_atomically
from models.hashes import checkpoint_hashes
from models.manifest import MANIFEST_NAME, Manifest, load_manifest
from models.tokens import add_control_tokens, grow_embeddings
from training.config.recipe import CheckpointModel, load_config
from training.model.gguf import model_folder
from training.model.output_rows import output_rows, set_row
from training.model.start import load_model, tokenizer_of
from training.model.token_rows import Floats
from training.run.export import ADAPTER
from training.run.folder import locked, put_in_place
from training.run.tokens import save_model

PUBLISHED = Path(__file__).parent
CHANGES = "changes.safetensors"
ROWS = "control_rows"
SCALE = "scale"
# Products of half-precision numbers are multiples of 2^-48, so a sum below this has no rounding in
# double precision: every order of summation gives the same bits.
EXACT_BELOW = 32.0
CARD = "card.md"
DOWN, UP = "lora_A", "lora_B"


def build(name: str, out: Path) -> Path:
    """Builds a published checkpoint, with its calibrations; the same bytes on every machine.

    Args:
        name: Of the checkpoint, which is also the name of the recipe that made it.
        out: Its folder. What lies there already is kept if it is this checkpoint.

    Raises:
        CheckpointError: The base is another one, or library versions give other weights.
        ConfigError: The base is missing, or something else lies at `out`.
    """
    manifest = load_manifest(PUBLISHED / name)
    with locked(out):
        if out.exists():
            if (out / MANIFEST_NAME).is_file() and load_manifest(out) == manifest:
                return out
            raise ConfigError(f"{out}: is another checkpoint; choose another place or remove it")
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(PUBLISHED / name, _base(name), manifest, partial)
        _check(partial, manifest)
        put_in_place(partial, out)
    return out


def publish(checkpoint: Path, folder: Path) -> Path:
    """Writes what `build` reads of a checkpoint, and returns the folder."""
    from safetensors.numpy import save

    manifest = load_manifest(checkpoint)
    folder.mkdir(exist_ok=True)
    rows = output_rows(load_model(checkpoint, "float32"), manifest.control_ids)
    changes = {ROWS: rows.astype(np.float32), **_adapters(checkpoint / ADAPTER)}
    write_atomically(folder / CHANGES, save(changes))
    shutil.copy2(checkpoint / MANIFEST_NAME, folder)
    return folder


def _adapters(folder: Path) -> dict[str, Any]:
    """Returns each adapted layer's two matrices by their names in the model, and the scale."""
    from safetensors.numpy import load_file

    if not folder.is_dir():
        return {}
    config = json.loads((folder / "adapter_config.json").read_bytes())
    matrices = {
        name.removeprefix("base_model.model."): value.astype(np.float16)
        for name, value in load_file(folder / "adapter_model.safetensors").items()
        if name.endswith((f"{DOWN}.weight", f"{UP}.weight"))
    }
    return {SCALE: np.array([config["lora_alpha"] / config["r"]]), **matrices}


def _base(name: str) -> CheckpointModel:
    model = load_config(Path(name)).model
    assert isinstance(model, CheckpointModel)
    return model


def _write(source: Path, base: CheckpointModel, manifest: Manifest, out: Path) -> None:
    from safetensors.numpy import load_file

    folder = model_folder(base)
    tokenizer = tokenizer_of(base, folder)
    made = add_control_tokens(tokenizer, {c.name: c.description for c in manifest.categories})
    if made.control_ids != manifest.control_ids:
        raise CheckpointError(
            f"{base.checkpoint}: gives the control tokens other ids than the rows"
        )
    model = load_model(folder, "float32")
    grow_embeddings(model, tokenizer, made)
    apply_changes(load_file(source / CHANGES), model, manifest)
    save_model(model, "float32", out)
    tokenizer.save_pretrained(out)
    for entry in (MANIFEST_NAME, CARD):
        shutil.copy2(source / entry, out)
    shutil.copytree(source / CALIBRATIONS, out / CALIBRATIONS)


def apply_changes(changes: Mapping[str, Any], model: Any, manifest: Manifest) -> None:
    """Adds adapters to the layers and sets the control tokens' rows, in place."""
    import torch

    for token, row in zip(manifest.control_ids, changes[ROWS], strict=True):
        set_row(model, token, row)
    with torch.no_grad():
        for name, up in changes.items():
            layer, dot, kind = name.rpartition(f".{UP}.")
            if not dot:
                continue
            weight = model.get_submodule(layer).weight
            added = merged(up, changes[f"{layer}.{DOWN}.{kind}"], float(changes[SCALE][0]))
            weight.copy_((weight.double() + torch.from_numpy(added)).float())


def merged(up: NDArray[np.float16], down: NDArray[np.float16], scale: float) -> Floats:
    """Returns what an adapter adds to a weight, the same bits on every machine.

    Args:
        up: `[out, r]`.
        down: `[r, in]`.
        scale: A power of two, which rounds nothing.

    Raises:
        CheckpointError: The numbers are too large for that.
    """
    left, right = up.astype(np.float64), down.astype(np.float64)
    if not np.abs(left).sum(1).max() * np.abs(right).max() < EXACT_BELOW:
        raise CheckpointError("an adapter is too large to be merged without rounding")
    added: Floats = (left @ right) * scale
    return added


def _check(folder: Path, manifest: Manifest) -> None:
    load_checkpoint(folder)
    hashes = checkpoint_hashes(folder)
    for path in list_calibrations(folder).values():
        verify(load_calibration(path), hashes, tuple(manifest.names))


if __name__ == "__main__":
    print(publish(Path(sys.argv[1]), Path(sys.argv[2])))  # noqa: T201
