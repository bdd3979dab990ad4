import os
from pathlib import Path

import pytest

from server.policies.source import MOST_BYTES, FieldPath, FileError, Problem, Source
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
    assert Source(written(tmp_path, TEXT)).line(path) == line


def test_value_is_plain(tmp_path: Path) -> None:
    value = Source(written(tmp_path, TEXT)).value
    assert value["list"] == ["one", {"key": "two", "other": 3}]
    assert value["merged"] == {"inner": 1, "own": 4}


def test_empty_file_is_nothing_at_its_first_line(tmp_path: Path) -> None:
    file = Source(written(tmp_path, ""))
    assert file.value is None
    assert file.line(("a",)) == 1


def test_problems_are_told_in_the_order_of_lines(tmp_path: Path) -> None:
    path = written(tmp_path, TEXT)
    problems = [
        Problem(("merged", "own"), "is 4"),
        Problem(("list", 0), "is one"),
        Problem((), "x"),
    ]
    error = Source(path).error(problems)
    assert error.problems == (
        f"{path}:2: x",
        f"{path}:5: list.0: is one",
        f"{path}:10: merged.own: is 4",
    )
    assert error.message == f"{path}:2: x (and 2 more)"


def test_invalid_yaml_is_one_problem_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a: 1\nb: 2\na: 3\n")
    with pytest.raises(FileError) as caught:
        Source(path)
    assert caught.value.problems == (f"{path}:3: invalid YAML: duplicate field 'a'",)


def test_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"absent\.yaml: it cannot be read: No such file"):
        Source(tmp_path / "absent.yaml")
    with pytest.raises(FileError, match="it cannot be read: Is a directory"):
        Source(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xff\n")
    with pytest.raises(FileError, match="it is not UTF-8"):
        Source(latin)


def test_file_that_is_none_is_not_read(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo.yaml"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(FileError, match="it cannot be read: it is not a regular file"):
            Source(path)


def test_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.touch()
    os.truncate(path, MOST_BYTES + 1)
    with pytest.raises(FileError, match=f"it has more than {MOST_BYTES} bytes"):
        Source(path)


def test_mount_that_hangs_is_one_line() -> None:
    with HangingPath.hangs(), pytest.raises(FileError) as caught:
        Source(HangingPath("/nowhere/policies.yaml"), timeout_s=0.05)
    assert caught.value.problems == (
        "/nowhere/policies.yaml: it cannot be read: no answer within 0.05 s",
    )
