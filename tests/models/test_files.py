from pathlib import Path

import pytest

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
    with pytest.raises(ConfigError, match=r"a\.yaml: is no YAML: the field 'b' stands there twice"):
        parse_yaml("b: 1\nb: 2\n", "a.yaml")
    text = "base: &base {b: 1}\nmine:\n  <<: *base\n  b: 2\n"
    assert parse_yaml(text, "a.yaml")["mine"] == {"b": 2}
