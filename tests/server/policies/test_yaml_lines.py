import os
from pathlib import Path

import pytest

from server.policies.yaml_lines import MOST_BYTES, FieldPath, FileError, Problem, YamlFile
from tests.server.hanging import HangingPath

TEXT = """\
# a comment
shared: &shared
  inner: 1
list:
  - one
  - key: two
    other: 3
merged:
  <<: *shared
  own: 4
both:
  <<: *shared
  inner: 6
yes: 5
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ((), 2),
        (("shared",), 2),
        (("shared", "inner"), 3),
        (("list",), 4),
        (("list", 0), 5),
        (("list", 1), 6),
        (("list", 1, "other"), 7),
        (("list", 2), 4),
        (("list", "x"), 4),
        (("merged", "own"), 10),
        (("merged", "inner"), 3),
        (("merged", "absent"), 8),
        (("both", "inner"), 13),
        (("absent", "deeper"), 2),
    ],
)
def test_field_has_its_line_and_an_absent_one_that_of_its_place(
    tmp_path: Path, path: FieldPath, line: int
) -> None:
    assert YamlFile(written(tmp_path, TEXT)).line(path) == line


def test_value_is_plain(tmp_path: Path) -> None:
    value = YamlFile(written(tmp_path, TEXT)).value
    assert value["list"] == ["one", {"key": "two", "other": 3}]
    assert value["merged"] == {"inner": 1, "own": 4}


def test_empty_file_is_nothing_at_its_first_line(tmp_path: Path) -> None:
    file = YamlFile(written(tmp_path, ""))
    assert file.value is None
    assert file.line(("a",)) == 1


def test_problems_are_told_in_the_order_of_lines(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT)
    problems = [
        Problem(("merged", "own"), "is 4"),
        Problem(("list", 0), "is one"),
        Problem((), "x"),
    ]
    error = YamlFile(path).error(problems)
    assert error.problems == (
        f"{path}:2: x",
        f"{path}:5: list.0: is one",
        f"{path}:10: merged.own: is 4",
    )
    assert error.message == f"{path}:2: x (and 2 more)"


@pytest.mark.parametrize(
    ("text", "where", "said"),
    [
        ("a: 1\nb: [\n", ":3", "expected"),
        ("a: 1\n b: 2\n", ":2", "mapping values are not allowed"),
        ("a: 1\nb: *nowhere\n", ":2", "undefined alias"),
        ("a: 1\nb: 2\na: 3\n", ":3", "a stands there twice"),
        ("x:\n  - a: 1\n    a: 2\n", ":3", "a stands there twice"),
        ("a: !!python/object:os.system x\n", ":1", "could not determine a constructor"),
        ("? [1]\n: 2\n", ":1", "unhashable key"),
        ("---\na: 1\n---\nb: 2\n", ":3", "another document"),
        ("a: 2020-13-45\n", "", "month must be in 1..12"),
        ("a: \x00\n", "", "unacceptable character"),
        ("[" * 100_000 + "]" * 100_000, "", "recursion"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(
    tmp_path: Path, text: str, where: str, said: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(FileError) as caught:
        YamlFile(path)
    assert caught.value.message.startswith(f"{path}{where}: ")
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_fields_that_stand_twice_are_all_told(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        YamlFile(written(tmp_path, "a: 1\na: 2\nb: {c: 1, c: 2}\n"))
    assert len(caught.value.problems) == 2


def test_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent\.yaml: it cannot be read: No such file"):
        YamlFile(tmp_path / "absent.yaml")
    with pytest.raises(FileError, match="it cannot be read: Is a directory"):
        YamlFile(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xff\n")
    with pytest.raises(FileError, match="it is no UTF-8"):
        YamlFile(latin)


def test_file_that_is_none_is_not_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(FileError, match="it cannot be read: it is no regular file"):
            YamlFile(path)


def test_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.touch()
    os.truncate(path, MOST_BYTES + 1)
    with pytest.raises(FileError, match=f"it has more than {MOST_BYTES} bytes"):
        YamlFile(path)


def test_mount_that_hangs_is_one_line() -> None:
    with HangingPath.hangs(), pytest.raises(FileError) as caught:
        YamlFile(HangingPath("/nowhere/policies.yaml"))
    assert caught.value.problems == (
        "/nowhere/policies.yaml: it cannot be read: no answer within 5 s",
    )


def test_document_that_holds_itself_ends(tmp_path: Path) -> None:
    file = YamlFile(written(tmp_path, "a: &a\n  b: *a\n"))
    assert file.line(("a", "b", "b", "b")) == 2
