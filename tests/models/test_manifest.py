import json
from pathlib import Path
from typing import Any

import pytest

from models.errors import CheckpointError
from models.manifest import (
    MANIFEST_NAME,
    Category,
    ControlToken,
    Manifest,
    Recipe,
    load_manifest,
    save_manifest,
)


def example() -> Manifest:
    return Manifest(
        respond=ControlToken(token=" [respond]", id=7),
        categories=(
            Category(name="safety", token="[refuse:safety]", id=5, description="schädlich 有害"),
            Category(name="unknown_1-a", token="[refuse:u]", id=6, refusal_text="No."),
        ),
        recipe=Recipe(config_sha256="ab", data_sha256={"train.jsonl": "cd"}, loss="ce", seed=3),
    )


def as_json() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(example().model_dump_json())
    return value


def test_manifest_survives_the_round_trip(tmp_path: Path) -> None:
    assert save_manifest(tmp_path, example()) == tmp_path / "rheostat.json"
    assert load_manifest(tmp_path) == example()


def test_manifest_without_recipe_survives_the_round_trip(tmp_path: Path) -> None:
    adopted = example().model_copy(update={"recipe": None})
    save_manifest(tmp_path, adopted)
    assert "recipe" not in json.loads((tmp_path / MANIFEST_NAME).read_bytes())
    assert load_manifest(tmp_path) == adopted


def test_save_replaces_the_file_as_a_whole(tmp_path: Path) -> None:
    # A reader that has the old file open keeps it: it was replaced and not written into.
    path = tmp_path / MANIFEST_NAME
    path.write_text("the old one")
    with path.open() as reader:
        save_manifest(tmp_path, example())
        assert reader.read() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_save_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    save_manifest(tmp_path, example())
    before = (tmp_path / MANIFEST_NAME).read_bytes()
    unwritable = example().model_copy(
        update={"respond": ControlToken.model_construct(token="\ud800", id=7)}
    )
    with pytest.raises(ValueError, match="surrogate"):
        save_manifest(tmp_path, unwritable)
    assert (tmp_path / MANIFEST_NAME).read_bytes() == before


def test_control_tokens_are_the_columns_with_respond_last() -> None:
    manifest = example()
    assert manifest.control_ids == [5, 6, 7]
    assert [t.token for t in manifest.control_tokens] == [
        "[refuse:safety]",
        "[refuse:u]",
        " [respond]",
    ]
    assert manifest.names == ["safety", "unknown_1-a"]


def test_missing_manifest_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_manifest(tmp_path)
    assert caught.value.message.startswith(f"{tmp_path / MANIFEST_NAME} does not exist")
    assert "rheostat adopt" in caught.value.message


def wrong(path: str, value: Any) -> dict[str, Any]:
    """Returns the example with one value replaced; a value of ... removes it."""
    changed = as_json()
    *parents, last = path.split(".")
    place: Any = changed
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("version", 2, "version"),
        ("version", "1", "version"),
        ("respond", ..., "respond"),
        ("respond", "[respond]", "respond"),
        ("respond.token", "", "respond.token"),
        ("respond.token", 5, "respond.token"),
        ("respond.id", -1, "respond.id"),
        ("respond.id", "seven", "respond.id"),
        ("respond.id", 1.5, "respond.id"),
        ("respond.id", ..., "respond.id"),
        ("respond.colour", "red", "respond.colour"),
        ("categories", [], "categories"),
        ("categories", {}, "categories"),
        ("categories", ..., "categories"),
        ("categories.1.name", "Safety", "categories.1.name"),
        ("categories.1.name", "", "categories.1.name"),
        ("categories.1.name", "a b", "categories.1.name"),
        ("categories.1.name", "safe\n", "categories.1.name"),
        ("categories.1.name", "a" * 65, "categories.1.name"),
        ("categories.1.name", ..., "categories.1.name"),
        ("categories.1.description", None, "categories.1.description"),
        ("categories.1.refusal_prefix", "Sorry,", ".refusal_prefix: the text follows the control"),
        ("recipe.seed", ..., "recipe.seed"),
        ("recipe.data_sha256", ["cd"], "recipe.data_sha256"),
        ("unknown", 1, "unknown"),
        ("respond.token", "[refuse:u]", "duplicate token '[refuse:u]'"),
        ("respond.id", 5, "duplicate id '5'"),
        ("categories.1.id", 5, "duplicate id '5'"),
        ("categories.1.token", "[refuse:safety]", "duplicate token '[refuse:safety]'"),
        ("categories.1.name", "safety", "duplicate category name 'safety'"),
    ],
)
def test_wrong_field_is_one_error_that_names_file_and_field(
    tmp_path: Path, path: str, value: Any, named: str
) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(wrong(path, value)))
    with pytest.raises(CheckpointError) as caught:
        load_manifest(tmp_path)
    assert str(tmp_path / MANIFEST_NAME) in caught.value.message
    assert named in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", '"x"', "\xff\xfe"])
def test_file_that_is_no_manifest_is_one_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        load_manifest(tmp_path)
    assert caught.value.message.startswith(f"{tmp_path / MANIFEST_NAME}: top level: ")
