from pathlib import Path

import pytest

from models.errors import ConfigError
from training.calibration.partial_scores import PartialScores
from training.calibration.scoring import Scores

ROWS = [Scores((0.1, -2.0), 3.5), Scores((1.25, 0.5), 4.0), Scores((-1e-8, 7.0), 9.0)]


def _open(path: Path, key: str = "k") -> PartialScores:
    return PartialScores(path, key, rows=3, columns=2)


def test_scores_outlive_the_process_that_got_them(tmp_path: Path) -> None:
    path = tmp_path / "calibrations" / "p.jsonl"
    with _open(path) as partial:
        partial.add([2, 0], [ROWS[2], ROWS[0]])
        assert partial.missing(3) == [1]
    with _open(path) as partial:
        assert len(partial) == 2
        assert partial.missing(3) == [1]
        partial.add([1], [ROWS[1]])
        margins, log_normaliser = partial.arrays(3)

    assert margins.dtype == "float32"
    assert log_normaliser.tolist() == [3.5, 4.0, 9.0]
    assert margins[1].tolist() == [1.25, 0.5]
    assert margins[2, 0] == pytest.approx(-1e-8, rel=1e-6)


@pytest.mark.parametrize("cut", range(1, 24))
def test_line_cut_off_by_a_kill_is_dropped_and_the_rest_kept(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "p.jsonl"
    with _open(path) as partial:
        partial.add([0, 1], ROWS[:2])
    last = len(path.read_bytes().splitlines(keepends=True)[-1])
    path.write_bytes(path.read_bytes()[:-cut])

    with _open(path) as partial:
        assert partial.missing(3) == ([1, 2] if cut <= last else [0, 1, 2])
        partial.add([1, 2], ROWS[1:])
    with _open(path) as partial:
        assert 1 not in partial.missing(3)
        assert 2 not in partial.missing(3)


def test_heading_cut_off_by_a_kill_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"key": "k", "ro')

    with _open(path) as partial:
        assert partial.missing(3) == [0, 1, 2]
        partial.add([0], ROWS[:1])
    with _open(path) as partial:
        assert partial.missing(3) == [1, 2]


def test_scores_under_another_key_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with _open(path) as partial:
        partial.add([0], ROWS[:1])
    with _open(path, "other") as partial:
        assert partial.missing(3) == [0, 1, 2]
    with _open(path) as partial:
        assert partial.missing(3) == [0, 1, 2]


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with _open(path), pytest.raises(ConfigError, match=r"p.jsonl: another calibration"):
        _open(path)
    _open(path).__exit__()


def test_remove_leaves_nothing(tmp_path: Path) -> None:
    with _open(tmp_path / "p.jsonl") as partial:
        partial.remove()
    assert list(tmp_path.iterdir()) == []
