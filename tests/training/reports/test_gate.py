from pathlib import Path

import pytest

from models.errors import ConfigError
from tests.training.evaluated import small_report
from training.reports.gate import check, exit_status, read_bounds

SETS = ["all", "rows"]


def gate(folder: Path, *lines: str) -> Path:
    path = folder / "gate.yaml"
    path.write_text("".join(f"- {line}\n" for line in lines))
    return path


def verdicts(folder: Path, *lines: str) -> tuple[list[str], int]:
    outcomes = check(small_report(), read_bounds(gate(folder, *lines), SETS))
    return [outcome.verdict for outcome in outcomes], exit_status(outcomes)


def test_kept_bounds_are_exit_status_0(tmp_path: Path) -> None:
    lines = (
        "rows.safe.refused <= 0.20",
        "all.safe.refused.high < 0.5",
        "all.unsafe.prompts >= 16",
        "robustness.typo.changed.n > 1e1",
        "texts.flip_to_refuse.safety >= 0.9",
        "rules.greedy.agreement >= 1",
        "cross_talk.safety.humanizing.changed <= 0",
        "rates.largest_gap <= 1",
    )
    assert verdicts(tmp_path, *lines) == (["kept"] * len(lines), 0)


def test_broken_bound_is_3_even_where_another_could_not_be_measured(tmp_path: Path) -> None:
    lines = ("rows.near_misses.refused <= 1", "rows.unsafe.refused < 1", "rows.auc > 0.5")

    assert verdicts(tmp_path, *lines) == (["not measured", "broken", "kept"], 3)


def test_bound_that_could_not_be_measured_is_4_and_says_why(tmp_path: Path) -> None:
    path = gate(tmp_path, "rows.near_misses.refused <= 1", "rows.categories.spam.refused <= 1")

    outcomes = check(small_report(), read_bounds(path, SETS))

    assert exit_status(outcomes) == 4
    assert [outcome.told for outcome in outcomes] == [
        "no prompt is marked as a near miss",
        "'spam' is none of safety, humanizing",
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("rows.safe.refused 0.2", "must read PATH <= NUMBER"),
        ("rows.safe.refused <= much", "must read PATH <= NUMBER"),
        ("7", "must read PATH <= NUMBER"),
        ("xstest.safe.refused <= 0.2", "'xstest' is none of .*all, rows"),
        ("rows.safe.refusd <= 0.2", "'refusd' is none of prompts, refused"),
        ("rows.safe <= 0.2", "is no figure; its fields are prompts, refused"),
        ("rows.safe.refused.value.x <= 0.2", "'x' is none of its fields"),
        ("rows.categories <= 1", "is no figure"),
        ("about.created <= 1", "is no figure"),
    ],
)
def test_wrong_line_says_what_is_wrong(tmp_path: Path, line: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_bounds(gate(tmp_path, "rows.auc > 0.5", line), SETS)


@pytest.mark.parametrize("text", ["", "a: 1", "[", "- {}"])
def test_file_that_is_no_list_of_bounds_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=r"gate.yaml"):
        read_bounds(path, SETS)
