import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from models.checkpoint import load_checkpoint
from models.errors import CheckpointError, ConfigError
from tests.training.conftest import WriteRows, small_rows
from training.config import TrainConfig
from training.train import train

MODEL = {
    "vocab_size": 400,
    "hidden_size": 64,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 128,
    "max_length": 64,
}


def _config(data: Path, model: dict[str, Any], **changes: Any) -> TrainConfig:
    values = {
        "name": "small",
        "seed": 1,
        "model": model,
        "data": {"train": [str(data)]},
        "categories": {"safety": "harms", "humanizing": "takes it for a person"},
        "refusal_texts": {"safety": "No."},
        "optimisation": {
            "epochs": 5,
            "batch_size": 8,
            "learning_rate": 0.003,
            "max_length": 64,
        },
    }
    return TrainConfig.model_validate({**values, **changes})


@pytest.fixture
def config(write_rows: WriteRows) -> TrainConfig:
    return _config(write_rows(small_rows()), MODEL)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_training_from_scratch_writes_a_servable_checkpoint(
    config: TrainConfig, tmp_path: Path
) -> None:
    out = train(config, tmp_path / "out")

    manifest, tokenizer = load_checkpoint(out)
    assert manifest.names == ["safety", "humanizing"]
    assert manifest.categories[0].refusal_text == "No."
    assert manifest.recipe is not None
    assert manifest.recipe.config_sha256 == config.sha256()
    assert (manifest.recipe.loss, manifest.recipe.seed) == ("cross_entropy", 1)
    assert len(tokenizer) <= 400
    assert yaml.safe_load((out / "resolved_config.yaml").read_text())["name"] == "small"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == (
        tokenizer.eos_token_id
    )
    assert not list(out.glob("*.bin"))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_training_lowers_both_parts_of_the_loss(config: TrainConfig, tmp_path: Path) -> None:
    parts = [entry for entry in _log(train(config, tmp_path / "out")) if "text_loss" in entry]

    assert parts[-1]["text_loss"] < 0.8 * parts[0]["text_loss"]
    assert parts[-1]["decision_loss"] < parts[0]["decision_loss"]


def test_training_twice_gives_the_same_weights(config: TrainConfig, tmp_path: Path) -> None:
    first = _weights(train(config, tmp_path / "first"))
    second = _weights(train(config, tmp_path / "second"))

    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights(config: TrainConfig, tmp_path: Path) -> None:
    first = _weights(train(config, tmp_path / "first"))
    second = _weights(train(config.model_copy(update={"seed": 2}), tmp_path / "second"))

    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_training_from_a_checkpoint_adds_the_control_tokens(
    config: TrainConfig, tmp_path: Path
) -> None:
    base = train(config, tmp_path / "base")
    known = load_checkpoint(base)[1].get_vocab()
    again = config.model_copy(
        update={"categories": {**config.categories, "medical": "asks for a diagnosis"}}
    )
    values = again.model_dump() | {"model": {"checkpoint": str(base)}}

    out = train(TrainConfig.model_validate(values), tmp_path / "out")

    manifest, tokenizer = load_checkpoint(out)
    assert manifest.names == ["safety", "humanizing", "medical"]
    assert set(tokenizer.get_vocab()) - set(known) == {"[refuse:medical]"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer)
    first = next(entry for entry in _log(out) if "text_loss" in entry)
    last = next(entry for entry in reversed(_log(base)) if "text_loss" in entry)
    assert first["text_loss"] < 1.2 * last["text_loss"]


def test_finished_checkpoint_is_kept_unless_forced(config: TrainConfig, tmp_path: Path) -> None:
    out = train(config, tmp_path / "out")
    written = (out / "model.safetensors").stat().st_mtime_ns

    train(config, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written

    train(config, out, force=True)
    assert (out / "model.safetensors").stat().st_mtime_ns > written
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_checkpoint_of_another_recipe_is_not_replaced_unless_forced(
    config: TrainConfig, tmp_path: Path
) -> None:
    out = train(config, tmp_path / "out")
    other = config.model_copy(update={"seed": 7})

    with pytest.raises(ConfigError, match="another recipe"):
        train(other, out)

    manifest, _ = load_checkpoint(train(other, out, force=True))
    assert manifest.recipe is not None
    assert manifest.recipe.seed == 7


def test_changed_data_are_noticed(
    config: TrainConfig, tmp_path: Path, write_rows: WriteRows
) -> None:
    out = train(config, tmp_path / "out")
    write_rows(small_rows()[:-1])

    with pytest.raises(ConfigError, match="other data"):
        train(config, out)


def test_folder_that_is_no_checkpoint_is_never_replaced(
    config: TrainConfig, tmp_path: Path
) -> None:
    kept = tmp_path / "out" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("mine")

    with pytest.raises(ConfigError, match="not a checkpoint"):
        train(config, tmp_path / "out", force=True)

    assert kept.read_text() == "mine"


def test_failed_run_leaves_no_finished_folder(
    config: TrainConfig, tmp_path: Path, write_rows: WriteRows
) -> None:
    write_rows([*small_rows(), {"prompt": "a " * 80, "category": None, "response": "b"}])

    with pytest.raises(ConfigError, match="nothing of the response"):
        train(config, tmp_path / "out")

    assert not (tmp_path / "out").exists()
    write_rows(small_rows())
    load_checkpoint(train(config, tmp_path / "out"))


def test_missing_data_file_is_named(tmp_path: Path) -> None:
    config = _config(tmp_path / "none.jsonl", MODEL)

    with pytest.raises(ConfigError, match=r"none\.jsonl cannot be read"):
        train(config, tmp_path / "out")


def test_checkpoint_without_weights_is_named(config: TrainConfig, tmp_path: Path) -> None:
    base = train(config, tmp_path / "base")
    (base / "model.safetensors").unlink()
    values = config.model_dump() | {"model": {"checkpoint": str(base)}}

    with pytest.raises(CheckpointError, match="the model cannot be loaded"):
        train(TrainConfig.model_validate(values), tmp_path / "out")


def test_stale_checkpoint_is_replaced_where_that_is_asked_for(
    config: TrainConfig, tmp_path: Path
) -> None:
    out = train(config, tmp_path / "checkpoint")
    other = config.model_copy(update={"seed": config.seed + 1})
    made = load_checkpoint(train(other, out, replace_stale=True))[0].recipe
    assert made is not None
    assert made.seed == other.seed
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert train(other, out, replace_stale=True) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
