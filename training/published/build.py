"""A published checkpoint: built from its base and the control tokens' rows, and written as such.

    python -m training.published.build CHECKPOINT training/published/NAME

writes what `build` reads of a checkpoint of `train: tokens`: the rows, `rheostat.json` and the
calibrations. The card is written by hand.
"""

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from training.run.folder import locked, put_in_place
from training.run.tokens import save_model

PUBLISHED = Path(__file__).parent
ROWS = "control_rows.safetensors"
CARD = "card.md"


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
    write_atomically(folder / ROWS, save({"rows": rows.astype("float32")}))
    shutil.copy2(checkpoint / MANIFEST_NAME, folder)
    shutil.rmtree(folder / CALIBRATIONS, ignore_errors=True)
    (folder / CALIBRATIONS).mkdir()
    for path in list_calibrations(checkpoint).values():
        shutil.copy2(path, folder / CALIBRATIONS)
    return folder


def _base(name: str) -> CheckpointModel:
    model = load_config(Path(name)).model
    assert isinstance(model, CheckpointModel)
    return model


def _write(source: Path, base: CheckpointModel, manifest: Manifest, out: Path) -> None:
    folder = model_folder(base)
    tokenizer = tokenizer_of(base, folder)
    made = add_control_tokens(tokenizer, {c.name: c.description for c in manifest.categories})
    if made.control_ids != manifest.control_ids:
        raise CheckpointError(
            f"{base.checkpoint}: gives the control tokens other ids than the rows"
        )
    model = load_model(folder, "float32")
    grow_embeddings(model, tokenizer, made)
    for token, row in zip(manifest.control_ids, _rows(source), strict=True):
        set_row(model, token, row)
    save_model(model, "float32", out)
    tokenizer.save_pretrained(out)
    for entry in (MANIFEST_NAME, CARD):
        shutil.copy2(source / entry, out)
    shutil.copytree(source / CALIBRATIONS, out / CALIBRATIONS)


def _rows(source: Path) -> Floats:
    from safetensors.numpy import load_file

    arrays: Mapping[str, Any] = load_file(source / ROWS)
    rows: Floats = arrays["rows"].astype("float64")
    return rows


def _check(folder: Path, manifest: Manifest) -> None:
    load_checkpoint(folder)
    hashes = checkpoint_hashes(folder)
    for path in list_calibrations(folder).values():
        verify(load_calibration(path), hashes, tuple(manifest.names))


if __name__ == "__main__":
    print(publish(Path(sys.argv[1]), Path(sys.argv[2])))  # noqa: T201
