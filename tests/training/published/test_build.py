"""The checkpoint that the package carries, built from the base that `make setup` brings."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from models.calibration import list_calibrations, load_calibration, verify
from models.checkpoint import load_checkpoint
from models.errors import CheckpointError, ConfigError
from models.hashes import checkpoint_hashes
from models.manifest import load_manifest
from models.tokens import grow_embeddings
from tests.toy import save_base
from tests.training.conftest import WriteRows, small_rows
from tests.training.recipes import CATEGORIES, weights_of
from training.config.recipe import TrainConfig, load_config
from training.model.start import load_model
from training.published.build import (
    CARD,
    CHANGES,
    PUBLISHED,
    apply_changes,
    build,
    merged,
    publish,
)
from training.run.train import train

NAME = "smollm2"
MOST_BYTES = 6_000_000


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(NAME, tmp_path_factory.mktemp("published") / NAME)


def test_it_fits_the_calibrations_that_it_comes_with(built: Path) -> None:
    hashes, names = checkpoint_hashes(built), tuple(load_manifest(built).names)
    paths = list_calibrations(built)

    assert list(paths) == ["default"]
    for path in paths.values():
        verify(load_calibration(path), hashes, names)


def test_what_the_package_carries_is_small() -> None:
    assert sum(p.stat().st_size for p in (PUBLISHED / NAME).rglob("*.*")) < MOST_BYTES


def test_it_is_kept_and_no_other_folder_is_replaced(built: Path, tmp_path: Path) -> None:
    before = (built / "model.safetensors").stat().st_mtime_ns
    build(NAME, built)
    assert (built / "model.safetensors").stat().st_mtime_ns == before

    other = tmp_path / "mine"
    other.mkdir()
    with pytest.raises(ConfigError, match="is another checkpoint"):
        build(NAME, other)


@pytest.mark.parametrize("way", ["lora", "tokens"])
def test_published_changes_give_the_trained_weights(
    way: str, tmp_path: Path, write_rows: WriteRows
) -> None:
    base = save_base(tmp_path / "base", tied=True)
    recipe = {
        "name": "small",
        "train": way,
        "model": {"checkpoint": str(base)},
        "data": {"train": [str(write_rows(small_rows()))]},
        "categories": CATEGORIES,
        "optimisation": {"max_length": 200, "learning_rate": 0.01, "batch_size": 8},
    }
    if way == "lora":
        recipe["lora"] = {"r": 4, "alpha": 8}
    trained = train(TrainConfig.model_validate(recipe), tmp_path / "trained")
    folder = publish(trained, tmp_path / "published")

    manifest, tokenizer = load_checkpoint(trained)
    model: Any = load_model(base, "float32")
    grow_embeddings(model, tokenizer, manifest)
    apply_changes(load_file(folder / CHANGES), model, manifest)

    assert load_manifest(folder) == manifest
    for name, weight in weights_of(trained).items():
        assert torch.allclose(model.state_dict()[name], weight, atol=2e-4), name


def test_merging_has_the_same_bits_in_every_order() -> None:
    generator = np.random.default_rng(0)
    up = generator.normal(0, 0.05, (64, 8)).astype(np.float16)
    down = generator.normal(0, 0.3, (8, 48)).astype(np.float16)
    order = generator.permutation(8)

    added = merged(up, down, 2.0)

    assert np.array_equal(merged(up[:, order], down[order], 2.0), added)
    one_by_one = np.zeros((64, 48))
    for u, d in zip(up.T.astype(float), down.astype(float), strict=True):
        one_by_one += np.outer(u, d)
    assert np.array_equal(2.0 * one_by_one, added)
    with pytest.raises(CheckpointError, match="too large"):
        merged(up * np.float16(1000), down, 2.0)


def test_card_names_what_the_manifest_was_made_from() -> None:
    card = (PUBLISHED / NAME / CARD).read_text()
    recipe = load_manifest(PUBLISHED / NAME).recipe

    assert recipe is not None
    assert recipe.config_sha256 == load_config(Path(NAME)).sha256()
    for digest in (recipe.config_sha256, *recipe.data_sha256.values()):
        assert digest in card
