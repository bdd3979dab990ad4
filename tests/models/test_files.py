from datetime import date
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from models.errors import ConfigError
from models.files import parse_yaml, write_atomically


def test_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for unique, content in ((False, "first"), (True, b"second")):
        write_atomically(path, content, unique=unique)
    assert path.read_bytes() == b"second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    path.with_name("a.json.partial").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_duplicate_field_is_an_error_but_a_merged_one_is_not() -> None:
    with pytest.raises(ConfigError, match=r"^a\.yaml:2: invalid YAML: duplicate field 'b'$"):
        parse_yaml("b: 1\nb: 2\n", "a.yaml")
    text = "base: &base {b: 1}\nmine:\n  <<: *base\n  b: 2\n"
    assert parse_yaml(text, "a.yaml")["mine"] == {"b": 2}


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("a: 1\nb: [\n", ":3", "expected"),
        ("a: 1\n b: 2\n", ":2", "mapping values are not allowed"),
        ("a: 1\nb: *nowhere\n", ":2", "undefined alias"),
        ("x:\n  - a: 1\n    a: 2\n", ":3", "duplicate field 'a'"),
        ("a: !!python/object:os.system x\n", ":1", "could not determine a constructor"),
        ("? [1]\n: 2\n", ":1", "unhashable key"),
        ("---\na: 1\n---\nb: 2\n", ":3", "another document"),
        ("a: 2020-13-45\n", "", "month must be in 1..12"),
        ("a: \x00\n", "", "unacceptable character"),
        ("[" * 100_000 + "]" * 100_000, "", "recursion"),
        ("a: &a\n  b: *a\n", ":1", "hold themselves"),
    ],
)
def test_invalid_yaml_is_one_line(text: str, where: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "a.yaml")
    assert caught.value.message.startswith(f"a.yaml{where}: invalid YAML: ")
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("alias", ["[*{0}, *{0}]", "{{<<: [*{0}, *{0}]}}"])
def test_aliases_that_multiply_are_rejected(alias: str) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    lines = ["a: &a {x: 1}"]
    lines += [f"{n}: &{n} {alias.format(old)}" for old, n in pairwise(letters)]
    with pytest.raises(ConfigError, match="aliases make it more than 1000000 values"):
        parse_yaml("\n".join(lines), "a.yaml")
    assert len(parse_yaml("\n".join(lines[:8]), "a.yaml")) == 8


def test_times_stay_times_where_a_library_makes_texts_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As lm-format-enforcer does when it is imported.
    constructors = yaml.SafeLoader.yaml_constructors
    text = constructors["tag:yaml.org,2002:str"]
    monkeypatch.setitem(constructors, "tag:yaml.org,2002:timestamp", text)
    assert yaml.safe_load("2027-01-31") == "2027-01-31"
    assert parse_yaml("2027-01-31", "a.yaml") == date(2027, 1, 31)
