"""Page, card, table, schema: one report with hostile strings everywhere."""

import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console
from typer.testing import CliRunner

from models.errors import ConfigError
from rheostat import app
from tests.docs.test_readme import ROOT
from tests.training.evaluated import small_report
from training.evaluation.report import DataSet, Report, load_report, schema
from training.evaluation.statistics import missing
from training.reports.card import BEGIN, write_card
from training.reports.page import report_page
from training.reports.summary import estimate, sections
from training.reports.table import report_table

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)> [red]| `x`\n# \"' --> ]]> & $y$ \\z"
)


def hostile() -> Report:
    report = small_report()
    data = {"rows": DataSet(source=HOSTILE, sha256={HOSTILE: HOSTILE}, prompts=1)}
    policy = report.about.policy.model_copy(update={"name": HOSTILE})
    named = {
        "model": HOSTILE,
        "command": HOSTILE,
        "server": HOSTILE,
        "data": data,
        "policy": policy,
    }
    about = report.about.model_copy(update={**named, "versions": {"rheostat": HOSTILE}})
    nothing = missing(HOSTILE)
    rates = report.rates.model_copy(update={"reason": HOSTILE, "largest_gap": nothing})
    texts = report.texts.model_copy(update={"grader": HOSTILE, "own_fidelity": nothing})
    return report.model_copy(update={"about": about, "rates": rates, "texts": texts})


@functools.cache
def small_page() -> str:
    return report_page(small_report())


class Page(HTMLParser):
    """Collects what a browser would make elements of, and what it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.shown = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.shown += data


def test_page_shows_hostile_strings_as_text() -> None:
    page = Page(report_page(hostile()))

    assert not page.tags & {"script", "a", "link", "iframe", "form", "object", "svg"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.shown.count(HOSTILE) >= 8


def test_page_fetches_nothing() -> None:
    page = Page(small_page())

    addresses = [str(value) for name, value in page.attributes if name in ("src", "href")]
    assert addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in addresses)
    policy = [value for name, value in page.attributes if name == "content"]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policy


def test_page_has_every_figure_with_its_gate_path() -> None:
    text = small_page()

    for section in sections(small_report()):
        for line in section.lines:
            assert f"<code>{line.path}</code>" in text
    assert text.count("<figure>") == 8


def test_card_is_metadata_that_hubs_read_and_a_section(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_card(small_report(), path)

    card = ModelCard(path.read_text())
    data: Any = card.data
    results = {one.metric_type: one for one in data.eval_results}
    assert set(results) >= {"f1", "roc_auc", "false_refusal_rate"}
    assert results["f1"].metric_value == 1.0
    assert results["f1"].dataset_type == "rows"
    assert "| falsely refused | 0.0% | 0 / 16 |" in card.text
    index = yaml.safe_load(path.read_text().split("---\n")[1])["model-index"]
    assert index[0]["name"] == "m"


def test_card_that_is_there_keeps_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags:\n- mine\n---\n# My model\n")

    write_card(small_report(), path)
    once = path.read_text()
    path.write_text(once + "\nThe end.\n")
    write_card(small_report(), path)

    assert path.read_text() == once + "\nThe end.\n"
    assert once.count(BEGIN) == 1
    assert "license: mit" in once
    assert "# My model" in once


def test_card_shows_hostile_strings_as_text(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    write_card(hostile(), path)

    text = ModelCard(path.read_text()).text
    outside_code = re.sub("`[^`]*`", "", text.replace("\\`", ""))
    assert "<script" not in outside_code
    assert "<img" not in outside_code
    assert [line for line in text.splitlines() if line.startswith("# ")] == []
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_page_of_markdown_gets_metadata_and_section_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.md"
    path.write_text("# Results\n")

    write_card(small_report(), path)

    assert path.read_text().startswith("---\nmodel-index:")
    assert f"# Results\n\n{BEGIN}" in path.read_text()
    assert caplog.messages == []


def test_card_with_wrong_metadata_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\n- a list\n---\n")

    with pytest.raises(ConfigError, match=r"README\.md"):
        write_card(small_report(), path)


def test_table_shows_figures_reasons_and_markup_as_text() -> None:
    console = Console(width=300)
    with console.capture() as captured:
        console.print(report_table(hostile()))

    text = captured.get()
    assert "[red]|" in text
    assert "0 / 16" in text
    assert "no prompt is marked as a near miss" in text


def test_every_shown_figure_is_in_the_report() -> None:
    for section in sections(small_report()):
        for line in section.lines:
            assert estimate(small_report(), line.path) is not None


def test_missing_figures_are_null_with_a_reason_never_0() -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "reason" in node and "value" in node and node["value"] is None:
                assert node["reason"]
                assert node["n"] == 0
            elif "low" in node:
                assert node["n"] > 0
                assert node["low"] <= node["value"] <= node["high"]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json.loads(small_report().to_json()))


def test_schema_of_the_docs_is_current_and_reports_follow_it() -> None:
    path = ROOT / "docs" / "evaluation.schema.json"
    documented = json.loads(path.read_text())

    assert documented == schema(), f"{path}: write json.dumps(schema(), indent=1) there"
    jsonschema_rs.validate(documented, json.loads(small_report().to_json()))
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(documented, {"version": 1})


def test_report_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(small_report().to_json())

    assert load_report(path) == small_report()
    path.write_text(path.read_text()[:-10])
    with pytest.raises(ConfigError, match="is no report"):
        load_report(path)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "report.json").write_text(small_report().to_json())
    return tmp_path


def _run(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(
        app, ["evaluate", "--report", str(folder / "report.json"), *arguments]
    )


def test_command_makes_page_and_card_of_a_report(folder: Path) -> None:
    page, card = folder / "new" / "r.html", folder / "card.md"

    done = _run(folder, "--html", str(page), "--model-card", str(card))

    assert done.exit_code == 0, done.output
    assert "falsely refused" in done.output
    assert page.read_text() == small_page()
    assert BEGIN in card.read_text()


@pytest.mark.parametrize(
    ("bound", "status"),
    [
        ("rows.safe.refused <= 0.2", 0),
        ("rows.safe.refused > 0.2", 3),
        ("rows.near_misses.refused <= 0.2", 4),
    ],
)
def test_gate_decides_the_exit_status(folder: Path, bound: str, status: int) -> None:
    (folder / "gate.yaml").write_text(f"- {bound}\n")

    done = _run(folder, "--gate", str(folder / "gate.yaml"))

    assert done.exit_code == status, done.output


def test_wrong_gate_is_an_error_before_anything_is_asked(folder: Path) -> None:
    (folder / "gate.yaml").write_text("- evaluation.safe.refuse <= 1\n")

    # Nobody listens there: a request would fail with another error.
    arguments = ["--url", "http://127.0.0.1:9", "--gate", str(folder / "gate.yaml")]
    done = CliRunner().invoke(app, ["evaluate", *arguments])

    assert isinstance(done.exception, ConfigError)
    assert "'refuse' is none of" in done.exception.message


def test_command_compares_two_reports(folder: Path) -> None:
    report, out = str(folder / "report.json"), folder / "difference.json"

    done = CliRunner().invoke(app, ["evaluate", "--compare", report, report, "--out", str(out)])

    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["paired"] == 32
