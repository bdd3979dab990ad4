"""Calibration files: what they refuse, how they are written, what they are bound to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import save_file

from models.calibration import (
    BENIGN,
    Calibration,
    CalibrationInfo,
    calibration_path,
    list_calibrations,
    load_calibration,
    save_calibration,
    verify,
)
from models.errors import CheckpointError, ConfigError
from models.hashes import checkpoint_hashes
from tests.models.margins import HASHES, NAMES, info, random_calibration

ROOT = Path(__file__).parents[2]


def arrays(k: int = 2) -> dict[str, np.ndarray]:
    calibration = random_calibration(0, k=k, prompts=20, benign=10)
    return {
        "margins": calibration.margins.copy(),
        "log_normaliser": calibration.log_normaliser.copy(),
        "category": calibration.category.copy(),
    }


def make(values: dict[str, np.ndarray], k: int = 2) -> Calibration:
    return Calibration(**values, info=info(NAMES[:k]))


# --- contents --------------------------------------------------------------------------------


def test_calibration_counts_its_prompts() -> None:
    calibration = make(arrays())
    assert calibration.prompts == {"humanizing": 20, "incomplete": 20}
    assert calibration.benign == 10
    assert calibration.names == NAMES[:2]


def test_calibration_cannot_be_changed() -> None:
    values = arrays()
    calibration = make(values)
    values["margins"][:] = 0.0
    assert calibration.margins.any()
    with pytest.raises(ValueError, match="read-only"):
        calibration.margins[0, 0] = 1.0


def _set(field: str, index: Any, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(values: dict[str, np.ndarray]) -> None:
        values[field][index] = value

    return change


def _cut(field: str, keep: Any) -> Callable[[dict[str, np.ndarray]], None]:
    def change(values: dict[str, np.ndarray]) -> None:
        values[field] = values[field][keep]

    return change


def _only(*categories: int, count: int = 20) -> Callable[[dict[str, np.ndarray]], None]:
    def change(values: dict[str, np.ndarray]) -> None:
        rows = [np.flatnonzero(values["category"] == c)[:count] for c in categories]
        keep = np.concatenate([*rows, np.array([], dtype=int)]).astype(int)
        for field in values:
            values[field] = values[field][keep]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("margins", (3, 1), np.nan), r"margins of prompt 3 is not finite \(nan\).*1 of 50"),
        (_set("margins", (slice(None), 0), np.inf), r"margins of prompt 0 .*\(inf\).*50 of 50"),
        (_set("log_normaliser", 4, -np.inf), "log_normaliser of prompt 4 is not finite"),
        (_set("log_normaliser", 2, -50.0), "log_normaliser of prompt 2 is -50, less than"),
        (_set("category", 7, 2), "the category 2, unknown among the 2 categories humanizing"),
        (_set("category", 7, -2), "the category -2, unknown"),
        (_cut("margins", slice(9)), r"margins has the shape \[9, 2\].*50 prompts and 2 categories"),
        (_cut("margins", (slice(None), [0])), r"shape \[50, 1\].*need \[50, 2\]"),
        (_cut("log_normaliser", slice(9)), r"log_normaliser has the shape \[9\].*need \[50\]"),
        (_only(), "there are no prompts"),
        (_only(BENIGN), "every prompt is benign"),
        (_only(BENIGN, 0), "the category 'incomplete' has no prompt"),
        (_only(0, 1, count=5), "'humanizing' has 5 prompts: it needs at least 20"),
    ],
)
def test_unusable_numbers_are_named(
    change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    values = arrays()
    change(values)
    with pytest.raises(ConfigError, match=message):
        make(values)


def test_benign_prompts_may_be_missing() -> None:
    values = arrays()
    _only(0, 1)(values)
    assert make(values).benign == 0


def test_category_name_that_stands_twice_is_named() -> None:
    with pytest.raises(ConfigError, match="duplicate category name in safety, safety"):
        Calibration(**arrays(), info=info(["safety", "safety"]))


def test_info_refuses_unknown_fields() -> None:
    with pytest.raises(ValidationError, match="extra"):
        type(info(NAMES)).model_validate({**info(NAMES).model_dump(), "colour": "red"})


# --- files -----------------------------------------------------------------------------------


def test_file_of_an_earlier_version_with_recalibration_loads() -> None:
    values = {**random_calibration(1).info.model_dump(mode="json"), "recalibration": {"maps": {}}}
    assert CalibrationInfo.model_validate_json(json.dumps(values)) == random_calibration(1).info


def test_saved_calibration_loads_unchanged(tmp_path: Path) -> None:
    calibration = random_calibration(1)
    path = save_calibration(tmp_path, calibration)
    assert path == tmp_path / "calibrations" / "default.safetensors"
    loaded = load_calibration(path)
    assert loaded.info == calibration.info
    for field in ("margins", "log_normaliser", "category"):
        np.testing.assert_array_equal(getattr(loaded, field), getattr(calibration, field))
        assert getattr(loaded, field).dtype == getattr(calibration, field).dtype


def test_several_calibrations_live_side_by_side(tmp_path: Path) -> None:
    assert list_calibrations(tmp_path) == {}
    for name in ("tenant-b", "default"):
        calibration = random_calibration(1)
        named = calibration.info.model_copy(update={"name": name})
        save_calibration(tmp_path, replace(calibration, info=named))
    assert list_calibrations(tmp_path) == {
        name: calibration_path(tmp_path, name) for name in ("default", "tenant-b")
    }


def test_saving_again_replaces(tmp_path: Path) -> None:
    save_calibration(tmp_path, random_calibration(1))
    second = random_calibration(2)
    path = save_calibration(tmp_path, second)
    np.testing.assert_array_equal(load_calibration(path).margins, second.margins)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = save_calibration(tmp_path, random_calibration(1))
    old = path.read_bytes()
    # A folder where the partial file would be opened.
    blocking = path.with_name(f"{path.name}.{os.getpid()}.partial")
    blocking.mkdir()
    with pytest.raises(OSError, match="directory"):
        save_calibration(tmp_path, random_calibration(2))
    assert path.read_bytes() == old
    assert list(list_calibrations(tmp_path)) == ["default"]


# Each child is ended by an alarm that Python does not see: nothing of its own runs after that.
_KILLED_WRITERS = """
import os, signal, sys
from pathlib import Path
from models.calibration import save_calibration
from tests.models.margins import random_calibration
calibration = random_calibration(0, prompts=2000, benign=2000)
for attempt in range(12):
    folder = Path(sys.argv[1]) / str(attempt)
    folder.mkdir()
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_REAL, 0.002 + 0.0073 * attempt)
        while True:
            save_calibration(folder, calibration)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGALRM
"""


def test_killed_writer_leaves_a_whole_file_or_none(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _KILLED_WRITERS, str(tmp_path)], cwd=ROOT, check=True)
    written = [path for folder in tmp_path.iterdir() for path in list_calibrations(folder).values()]
    assert written
    assert all(load_calibration(path).benign == 2000 for path in written)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    path = save_calibration(tmp_path, random_calibration(1))
    whole = path.read_bytes()
    for size in (0, 7, 200, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"default\.safetensors: .*cannot be read"):
            load_calibration(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: .*cannot be read"):
        load_calibration(calibration_path(tmp_path, "none"))


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"weight": np.zeros(3)}, {}, "no calibration: it lacks category"),
        (arrays(), {}, "no calibration: it lacks metadata"),
        ({**arrays(), "category": np.zeros(50, np.int32)}, {"rheostat": "{}"}, "is int32"),
        (arrays(), {"rheostat": "not json"}, "metadata: Invalid JSON"),
        (arrays(), {"rheostat": json.dumps({"version": 2})}, "version: Input should be 1"),
        (arrays(5), {"rheostat": info(NAMES[:2]).model_dump_json()}, "2 categories need"),
    ],
)
def test_foreign_files_are_named(
    tmp_path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(CheckpointError, match=rf"foreign\.safetensors: .*{message}"):
        load_calibration(path)


# --- what it is bound to ---------------------------------------------------------------------


def test_verify_accepts_the_checkpoint_it_was_measured_with() -> None:
    verify(random_calibration(1), HASHES, NAMES)


@pytest.mark.parametrize("what", ["weights", "template", "tokenizer"])
def test_verify_names_both_hashes(what: str) -> None:
    other = HASHES.model_copy(update={what: "f" * 64})
    theirs = getattr(HASHES, what)[:12]
    with pytest.raises(
        CheckpointError,
        match=f"'default' was measured with the {what} {theirs}, the checkpoint has the {what} "
        + "f" * 12,
    ):
        verify(random_calibration(1), other, NAMES)


def test_verify_names_both_lists_of_categories() -> None:
    with pytest.raises(
        CheckpointError, match=r"knows the categories humanizing, .*manifest refuse"
    ):
        verify(random_calibration(1), HASHES, ("refuse",))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file({"weight": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path


def test_hashes_tell_what_changed(checkpoint: Path) -> None:
    before = checkpoint_hashes(checkpoint).model_dump()
    changes = {
        "weights": ("extra.safetensors", "more"),
        "template": ("chat_template.jinja", "{{ messages }}!"),
        "tokenizer": ("tokenizer_config.json", '{"eos_token": "<|end|>"}'),
    }
    for what, (name, text) in changes.items():
        path = checkpoint / name
        old = path.read_bytes() if path.exists() else None
        path.write_text(text)
        after = checkpoint_hashes(checkpoint).model_dump()
        assert [key for key in before if after[key] != before[key]] == [what]
        path.unlink() if old is None else path.write_bytes(old)
    assert checkpoint_hashes(checkpoint).model_dump() == before


def test_hashes_see_a_renamed_shard(checkpoint: Path) -> None:
    before = checkpoint_hashes(checkpoint)
    (checkpoint / "model.safetensors").rename(checkpoint / "other.safetensors")
    assert checkpoint_hashes(checkpoint).weights != before.weights


def test_hashes_read_the_template_out_of_the_tokenizer_config(checkpoint: Path) -> None:
    in_file = checkpoint_hashes(checkpoint)
    (checkpoint / "chat_template.jinja").unlink()
    without = checkpoint_hashes(checkpoint)
    config = {"eos_token": "</s>", "chat_template": "{{ messages }}"}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    assert checkpoint_hashes(checkpoint) == in_file
    assert without.template != in_file.template


def test_hashes_survive_a_copy(checkpoint: Path) -> None:
    before = checkpoint_hashes(checkpoint)
    os.utime(checkpoint / "model.safetensors", (1, 1))
    assert checkpoint_hashes(checkpoint) == before


def test_hashes_of_a_folder_without_weights_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no weights: no \*\.safetensors"):
        checkpoint_hashes(tmp_path)


def test_hashes_name_a_broken_tokenizer_config(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json cannot be read"):
        checkpoint_hashes(checkpoint)
    (checkpoint / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json holds no JSON object"):
        checkpoint_hashes(checkpoint)
