"""A category more, or one less, on a trained checkpoint: no other decision changes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.numpy import load_file
from typer.testing import CliRunner

from models.checkpoint import load_checkpoint
from models.errors import CheckpointError, ConfigError
from models.manifest import save_manifest
from rheostat import app
from tests.toy import save_base
from tests.training.conftest import THINGS, Rows, WriteRows, small_rows
from tests.training.recipes import CATEGORIES, decision_logits, weights_of
from training.config.data import Source
from training.config.recipe import TrainConfig
from training.run.categories import add_category, new_category, remove_category
from training.run.kept_states import KEPT_STATES
from training.run.train import train

MEDICINE: Rows = [
    {"prompt": f"Which dose of {thing} heals me?", "category": "medicine", "response": None}
    for thing in THINGS
]
QUESTIONS = ("How do I steal pens?", "Do you love pens?", "Where do I buy pens?", "Is it late?")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    write_rows: WriteRows,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    base = save_base(tmp_path / "base", tied=request.param)
    recipe = {
        "name": "small",
        "train": "tokens",
        "model": {"checkpoint": str(base)},
        "data": {"train": [str(write_rows(small_rows()))]},
        "categories": CATEGORIES,
    }
    return train(TrainConfig.model_validate(recipe), tmp_path / "out")


def _added(checkpoint: Path, data: Path, name: str = "medicine") -> Any:
    wanted = new_category(name, "asks for a dose", "Please ask a doctor.")
    return add_category(checkpoint, wanted, [Source(path=str(data))])


def _margins(checkpoint: Path, *questions: str) -> dict[str, list[float]]:
    manifest, _ = load_checkpoint(checkpoint)
    margins: dict[str, list[float]] = {name: [] for name in manifest.names}
    for question in questions:
        logits = decision_logits(checkpoint, question)
        for category in manifest.categories:
            margin = logits[category.id] - logits[manifest.respond.id]
            margins[category.name].append(float(margin))
    return margins


def _files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_new_category_is_learnt_and_no_other_margin_moves(
    checkpoint: Path, write_rows: WriteRows
) -> None:
    before, weights = _margins(checkpoint, *QUESTIONS), weights_of(checkpoint)
    (checkpoint / "calibrations").mkdir()
    (checkpoint / "calibrations" / "default.safetensors").touch()

    added = _added(checkpoint, write_rows(MEDICINE))

    after = _margins(checkpoint, *QUESTIONS)
    assert {name: after[name] for name in before} == before
    for name, weight in weights.items():
        assert torch.equal(weights_of(checkpoint)[name][: len(weight)], weight), name
    (margin,) = _margins(checkpoint, "Which dose of pens heals me?")["medicine"]
    assert margin > 0 > max(after["medicine"][:3])
    assert (added.prompts, added.refused) == (8, 1.0)
    assert added.others_refused < 0.3
    assert added.calibrations == 1
    assert not (checkpoint / "calibrations").exists()
    manifest, _ = load_checkpoint(checkpoint)
    assert manifest.names == [*CATEGORIES, "medicine"]
    assert manifest.categories[-1].refusal_text == "Please ask a doctor."
    assert not list(checkpoint.parent.glob("out.*"))


def test_what_was_added_and_removed_leaves_the_checkpoint_as_it_was(
    checkpoint: Path, write_rows: WriteRows
) -> None:
    before, margins = load_checkpoint(checkpoint)[0], _margins(checkpoint, *QUESTIONS)
    weights, states = weights_of(checkpoint), load_file(checkpoint / KEPT_STATES)
    _added(checkpoint, write_rows(MEDICINE))
    remove_category(checkpoint, "medicine")
    manifest, tokenizer = load_checkpoint(checkpoint)
    assert manifest == before
    assert len(tokenizer.encode("[refuse:medicine]", add_special_tokens=False)) > 1
    assert _margins(checkpoint, *QUESTIONS) == margins
    assert all(torch.equal(weight, weights[n]) for n, weight in weights_of(checkpoint).items())
    again = load_file(checkpoint / KEPT_STATES)
    assert all((again[name] == array).all() for name, array in states.items())


def test_tokens_behind_the_removed_one_move_up(checkpoint: Path, write_rows: WriteRows) -> None:
    margins = _margins(checkpoint, *QUESTIONS)
    remove_category(checkpoint, "safety")
    manifest, _ = load_checkpoint(checkpoint)
    assert manifest.names == ["humanizing"]
    assert _margins(checkpoint, *QUESTIONS) == {"humanizing": margins["humanizing"]}
    _added(checkpoint, write_rows(MEDICINE))
    assert load_checkpoint(checkpoint)[0].names == ["humanizing", "medicine"]


def _few() -> Rows:
    return [*MEDICINE[:4], *small_rows()]


@pytest.mark.parametrize(
    ("rows", "name", "reason"),
    [
        (_few(), "medicine", "4 of its rows have the category medicine, and 5 are the least"),
        (MEDICINE, "safety", "has a category safety already"),
        (MEDICINE, "respond", "respond is what the answers are called"),
        (MEDICINE, "Not a name", "--name Not a name"),
        (MEDICINE, "dentistry", "medicine"),
    ],
)
def test_bad_input_leaves_the_checkpoint_as_it_is(
    checkpoint: Path, write_rows: WriteRows, rows: Rows, name: str, reason: str
) -> None:
    before = _files(checkpoint)
    with pytest.raises(ConfigError, match=reason):
        _added(checkpoint, write_rows(rows), name)
    with pytest.raises(ConfigError, match="has no category 'dentistry'"):
        remove_category(checkpoint, "dentistry")
    assert _files(checkpoint) == before
    assert not list(checkpoint.parent.glob("out.*"))


def test_last_category_stays(checkpoint: Path) -> None:
    remove_category(checkpoint, "safety")
    with pytest.raises(ConfigError, match="humanizing is its only category"):
        remove_category(checkpoint, "humanizing")


def test_checkpoint_that_keeps_its_tokens_is_refused(
    checkpoint: Path, write_rows: WriteRows
) -> None:
    manifest, _ = load_checkpoint(checkpoint)
    save_manifest(checkpoint, manifest.model_copy(update={"kept": True}))
    with pytest.raises(CheckpointError, match="keeps its control tokens in the context"):
        _added(checkpoint, write_rows(MEDICINE))


def test_others_come_from_the_data_where_no_states_are_kept(
    checkpoint: Path, write_rows: WriteRows
) -> None:
    shutil.rmtree(checkpoint / "decisions")
    with pytest.raises(ConfigError, match="answered, and of one there are 0"):
        _added(checkpoint, write_rows(MEDICINE))
    assert _added(checkpoint, write_rows([*MEDICINE, *small_rows()])).refused == 1.0


def test_commands_say_what_was_done(checkpoint: Path, write_rows: WriteRows) -> None:
    data = write_rows(MEDICINE)
    added = CliRunner().invoke(
        app, ["add-category", str(checkpoint), "--data", str(data), "--name", "medicine"]
    )
    assert added.exit_code == 0, added.output
    assert "medicine is learnt from 8 prompts" in added.output
    removed = CliRunner().invoke(app, ["remove-category", str(checkpoint), "--name", "medicine"])
    assert "medicine is removed" in removed.output
