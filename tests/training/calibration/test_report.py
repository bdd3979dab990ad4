import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from models.calibration import Calibration, CalibrationInfo
from models.errors import ConfigError
from models.hashes import Hashes
from training.calibration.figures import figures, save_figures
from training.calibration.report import report, save_report, summary

VOID = {"meta", "img", "br"}


def _calibration(
    names: tuple[str, ...] = ("safety", "humanizing"), own: int = 40, benign: int = 100
) -> Calibration:
    """Own margins -2 .. 2, others' -9; benign -8 .. -4: each 5 % of a rate is 2 prompts of 40."""
    rng = np.random.default_rng(0)
    category = np.repeat([*range(len(names)), -1], [*[own] * len(names), benign])
    margins = np.full((len(category), len(names)), -9.0)
    for at in range(len(names)):
        margins[category == at, at] = np.linspace(-2, 2, own)
    margins[category == -1] = rng.uniform(-8, -4, (benign, len(names)))
    info = CalibrationInfo(
        name="default",
        created=datetime(2026, 11, 1, tzinfo=UTC),
        categories=names,
        hashes=Hashes(weights="aa" * 32, template="bb" * 32, tokenizer="cc" * 32),
        data_sha256={"<b>.jsonl": "dd" * 32},
        seeds={"sample": 7},
        rheostat="0.1.0",
    )
    return Calibration(
        margins=margins.astype(np.float32),
        log_normaliser=np.full(len(category), 5.0, dtype=np.float32),
        category=category,
        info=info,
    )


class _Balance(HTMLParser):
    """Fails on a tag that closes what is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return report(_calibration())


def test_page_is_well_formed_and_fetches_nothing(page: str) -> None:
    parser = _Balance()
    parser.feed(page)

    assert parser.open == []
    assert len(parser.links) == 4
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert "url(" not in page
    assert "<script" not in page


def test_page_says_where_it_comes_from_and_escapes_names(page: str) -> None:
    for wanted in ("aa" * 32, "bb" * 32, "cc" * 32, "dd" * 32, "seed: sample", "2026-11-01"):
        assert wanted in page
    assert "&lt;b&gt;.jsonl" in page
    assert "<b>" not in page


def test_page_turns_rates_into_the_biases_that_the_margins_say(page: str) -> None:
    # Half of 40 margins, -2 to 2 in steps of 4/39, are above 0: the bias lies midway, at 0, and
    # 50 % of them are refused; Clopper-Pearson's interval for 20 of 40 is 33.8 to 66.2.
    row = re.search(r"<tr><td>50%</td>(.*?)</tr>", page)
    assert row is not None
    cell = row[1].split("</td>")[0]
    assert re.search(r"[+-]0\.00", cell)
    assert "50.0% (33.8 to 66.2)" in cell
    # Of 100 benign prompts 0 are refused there.
    assert "benign 0.0%" in cell


def test_page_says_how_many_prompts_a_bound_takes(page: str) -> None:
    assert "needs at least" in page
    assert "the calibration &#x27;default&#x27; has 100" in page


def test_page_without_benign_prompts_has_no_trade_off() -> None:
    calibration = _calibration(benign=0)

    assert list(figures(calibration)) == ["curves", "margins"]
    assert "Trade-off" not in report(calibration)


def test_single_token_checkpoint_is_drawn(tmp_path: Path) -> None:
    calibration = _calibration(names=("refuse",))

    written = save_figures(calibration, tmp_path)

    assert [path.name for path in written] == [
        "default-curves.png",
        "default-trade-off.png",
        "default-reliability.png",
        "default-margins.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_page_of_a_single_token_with_few_benign_prompts_leaves_out_what_it_cannot_say() -> None:
    page = report(_calibration(names=("refuse",), benign=5))

    assert "All categories asked" not in page


def test_curve_passes_through_what_the_margins_say() -> None:
    axis = figures(_calibration())["curves"].axes[0]
    own = next(line for line in axis.get_lines() if line.get_label() == "its own prompts")
    biases, rates = (np.asarray(values, dtype=float) for values in own.get_data())

    at_zero = rates[abs(biases).argmin()]
    assert at_zero == pytest.approx(50.0)
    assert (np.diff(rates) >= 0).all()
    assert rates[biases < -2.01].max() == 0
    assert rates[biases > 2.01].min() == 100


def test_summary_counts_as_trained() -> None:
    console = Console(width=100, record=True, file=StringIO())
    console.print(summary(_calibration()))
    text = console.export_text()

    assert re.search(r"safety\s.*40\s.*50\.0%.*33\.8 to 66\.2.*0\.0%.*0\.0 to 3\.6", text)
    assert "100 benign prompts" in text


def test_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent/report.html: cannot be written"):
        save_report(_calibration(), tmp_path / "absent" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match=r"folder.html: cannot be written"):
        save_report(_calibration(own=20, benign=0), tmp_path / "folder.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder.html"]
