"""docs/evaluation.md: its commands run, its paths are figures."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rheostat import app
from tests.docs.test_readme import ROOT, commands
from tests.training.evaluated import small_report
from training.evaluation.report import Report
from training.reports.gate import read_bounds

PAGE = ROOT / "docs" / "evaluation.md"
TEXT = PAGE.read_text(encoding="utf-8")
OFFLINE = [words for words in commands(PAGE) if {"--report", "--compare"} & set(words)]


def named(name: str) -> Report:
    """Returns the small report as if its set had another name."""
    return Report.model_validate_json(small_report().to_json().replace('"rows"', f'"{name}"'))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page's commands read."""
    monkeypatch.chdir(tmp_path)
    for name in ("report.json", "before.json"):
        Path(name).write_text(named("evaluation").to_json())
    (block,) = re.findall(r"  ```yaml\n(.*?)  ```", TEXT, re.DOTALL)
    Path("gate.yaml").write_text(block)
    return tmp_path


@pytest.mark.parametrize("words", OFFLINE, ids=lambda words: words[-2])
def test_command_on_a_report_does_what_the_page_says(folder: Path, words: list[str]) -> None:
    done = CliRunner().invoke(app, words[1:])

    # The small report has so few prompts that not every bound is kept.
    assert done.exit_code == (3 if "gate.yaml" in words else 0), done.output
    if words[-2] != "--gate":
        assert Path(words[-1]).is_file()


def test_every_kind_of_output_has_a_command() -> None:
    used = {word for words in OFFLINE for word in words if word.startswith("--")}

    assert used == {"--report", "--html", "--model-card", "--gate", "--compare", "--out"}


def test_paths_of_the_table_are_figures(tmp_path: Path) -> None:
    section = TEXT.partition("## What it reports")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    paths = []
    for cell in cells:
        first, *others = re.findall(r"`([\w.*]+)`", cell)
        stem = first.rpartition(".")[0]
        paths += [first, *(stem + other if other.startswith(".") else other for other in others)]
    paths = [path for path in paths if "." in path]
    assert len(paths) > 20
    fill = {"SET": "evaluation", "NAME": "safety", "A": "safety", "B": "humanizing"}
    fill |= {"RULE": "paper", "WAY": "typo", "*": "unsafe"}
    lines = [".".join(fill.get(part, part) for part in path.split(".")) for path in paths]
    gate = tmp_path / "gate.yaml"
    gate.write_text("".join(f"- {line} >= 0\n" for line in lines))

    assert len(read_bounds(gate, ["all", "evaluation"])) == len(paths)
