import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training.measure.figures import (
    loss_curves,
    margin_histograms,
    metric_history,
    reliability_diagram,
    save_training_plots,
    trade_off,
)
from training.measure.metrics import refusal_scores, reliability
from training.measure.monitor import Measurement

LOG: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 1.5, "eval_vocabulary_loss": 6.0, "eval_text_loss": 4.0},
    {"step": 10, "loss": 2.0, "decision_loss": 1.0, "text_loss": 3.0},
    {"step": 20, "loss": 1.0, "decision_loss": 0.5, "text_loss": 1.0},
    {"step": 20, "eval_loss": 0.4, "eval_auc": 0.9, "eval_refused": 0.8, "eval_falsely_refused": 0},
    {"seconds": 3.0},
]


def measurement(truth: list[str | None], names: tuple[str, ...] = ("a", "b")) -> Measurement:
    margins = np.random.default_rng(0).normal(0, 3, size=(len(truth), len(names)))
    for row, name in enumerate(truth):
        if name is not None:
            margins[row, names.index(name)] += 4
    return Measurement(margins, tuple(truth), names, {})


MIXED = measurement(["a", "b", None] * 20)


def _lines(axis: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axis.get_lines()
    }


def test_loss_curves_show_what_was_logged() -> None:
    figure = loss_curves(LOG)

    assert figure is not None
    decision, text = figure.axes
    assert _lines(decision) == {
        "training rows": [(10, 1.0), (20, 0.5)],
        "held-out rows": [(0, 6.0)],
        "held-out rows, among control tokens": [(0, 1.5), (20, 0.4)],
    }
    assert _lines(text) == {
        "training rows": [(10, 3.0), (20, 1.0)],
        "held-out rows": [(0, 4.0)],
    }
    assert decision.get_yscale() == "log"


def test_loss_that_reaches_zero_is_drawn_on_a_linear_scale() -> None:
    figure = loss_curves([{"step": 1, "decision_loss": 0.5}, {"step": 2, "decision_loss": 0.0}])

    assert figure is not None
    assert [axis.get_yscale() for axis in figure.axes] == ["linear"]


def test_history_shows_what_was_measured() -> None:
    figure = metric_history(LOG)

    assert figure is not None
    assert set(_lines(figure.axes[0])) == {
        "AUC",
        "refused of what should be",
        "refused of what should not be",
    }


def test_nothing_logged_gives_no_curve() -> None:
    assert loss_curves([{"seconds": 1.0}]) is None
    assert metric_history([{"step": 1, "decision_loss": 1.0}]) is None


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_margins_have_one_panel_a_category(count: int) -> None:
    names = tuple("abcdefg"[:count])

    figure = margin_histograms(measurement([*names, None] * 5, names))

    titles = [axis.get_title() for axis in figure.axes if axis.axison]
    assert titles == list(names)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    kinds = ["its own rows", "rows of other categories", "rows to be answered"]
    assert labels == (kinds if count > 1 else [kinds[0], kinds[2]])


def test_reliability_points_are_the_bins() -> None:
    scores = refusal_scores(MIXED.margins)
    to_refuse = np.array([name is not None for name in MIXED.truth])

    axis = reliability_diagram(scores, to_refuse).axes[0]

    points: Any = next(line for line in axis.get_lines() if line.get_marker() == "o")
    bins = reliability(scores, to_refuse)
    assert list(points.get_xdata()) == [entry.predicted for entry in bins]
    assert list(points.get_ydata()) == [entry.hits / entry.total for entry in bins]


def test_trade_off_by_hand() -> None:
    # Scores 2 and 0 to refuse, 1 and -1 to answer: thresholds 2, 1, 0, -1 refuse one more each.
    margins = np.array([[2.0], [0.0], [1.0], [-1.0]])

    figure = trade_off(Measurement(margins, ("a", "a", None, None), ("a",), {}))

    assert figure is not None
    lines = _lines(figure.axes[0])
    assert lines["all rows to be refused"] == [(0, 0), (0, 50), (50, 50), (50, 100), (100, 100)]
    assert lines["as trained"] == [(50, 100)]
    assert "a" not in lines


def test_trade_off_passes_through_what_greedy_does_as_trained() -> None:
    margins = np.array([[0.5, -9.0], [-0.1, -9.0], [-0.2, -0.2], [-9.0, -9.0]])

    figure = trade_off(Measurement(margins, ("a", "a", None, None), ("a", "b"), {}))

    assert figure is not None
    lines = _lines(figure.axes[0])
    assert lines["as trained"] == [(0, 50)]
    assert lines["all rows to be refused"] == [(0, 0), (0, 50), (0, 100), (50, 100), (100, 100)]


def test_trade_off_needs_both_sorts() -> None:
    assert trade_off(measurement(["a", "b"])) is None
    assert trade_off(measurement([None, None])) is None


def test_files_are_written_and_a_missing_sort_is_no_hindrance(tmp_path: Path) -> None:
    written = save_training_plots(tmp_path, LOG, MIXED)
    fewer = save_training_plots(tmp_path / "other", [], measurement([None] * 4))

    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "plots/loss.png",
        "plots/history.png",
        "plots/margins.png",
        "plots/reliability.png",
        "plots/trade_off.png",
    ]
    assert [path.name for path in fewer] == ["margins.png", "reliability.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in [*written, *fewer])


def test_broken_numbers_in_the_log_are_drawn_as_gaps(tmp_path: Path) -> None:
    log = [{"step": step, "decision_loss": value} for step, value in ((1, 1.0), (2, math.nan))]

    assert [path.name for path in save_training_plots(tmp_path, log)] == ["loss.png"]
