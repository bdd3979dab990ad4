"""The figures of an evaluation's HTML page."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.evaluation.dials import RATES
from training.evaluation.report import CrossTalk, Report, SweepPoint
from training.evaluation.statistics import Estimate
from training.measure.figures import (
    BLACK,
    BLUE,
    COLUMNS,
    RED,
    blank,
    category_look,
    margin_histograms,
    reliability_diagram,
    trade_off,
)
from training.measure.metrics import refusal_scores
from training.measure.monitor import Measurement

PERCENT = [100 * rate for rate in RATES]


def drawings(report: Report) -> dict[str, Figure]:
    """Returns each figure that the report's prompts allow, by its caption."""
    names = tuple(report.categories)
    margins = np.array([record.margins for record in report.records])
    truth = tuple(record.category for record in report.records)
    measurement = Measurement(margins, truth, names, {})
    to_refuse = np.array([category is not None for category in truth])
    found = {
        "All dials moved together": shared_sweep(report.sweeps.shared),
        "The rule of the refusal-token paper, one threshold for all": shared_sweep(
            report.sweeps.paper
        ),
        "Each dial alone, the others as served": dial_sweeps(report.sweeps.dials),
        "Requested and achieved refusal rate": achieved_rates(report)
        if report.rates.points
        else None,
        "Cross-talk": cross_talk(report.cross_talk) if len(names) > 1 else None,
        "Trade-off, as one bias moves": trade_off(measurement),
        "Reliability of the refusal probability": reliability_diagram(
            refusal_scores(margins), to_refuse
        ),
        "Margins": margin_histograms(measurement),
    }
    return {caption: figure for caption, figure in found.items() if figure is not None}


def as_svg(figure: Figure) -> bytes:
    """Returns a figure as SVG, the same bytes for the same figure."""
    drawn = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rheostat"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def shared_sweep(points: Sequence[SweepPoint]) -> Figure:
    """Draws what one position of all dials refuses."""
    figure, (axis,) = blank(1, 1, (7.6, 4.4))
    biases = [point.bias for point in points]
    _band(axis, biases, [point.unsafe for point in points], "should be refused", BLUE)
    _band(axis, biases, [point.safe for point in points], "should be answered", RED)
    _finish(axis, "bias b of every category (nats); the paper's threshold T is 1 / (1 + exp(b))")
    axis.legend(frameon=False)
    return figure


def dial_sweeps(dials: Mapping[str, Sequence[SweepPoint]]) -> Figure:
    """Draws what each dial refuses of its own and of the safe prompts."""
    figure, axes = _panels(len(dials))
    for axis, (name, points) in zip(axes, dials.items(), strict=False):
        biases = [point.bias for point in points]
        _band(axis, biases, [p.categories[name] for p in points], "its own prompts", BLUE)
        _band(axis, biases, [p.safe for p in points], "should be answered", RED)
        _finish(axis, "bias (nats)")
        axis.set_title(name)
    _shared_legend(figure, axes)
    return figure


def achieved_rates(report: Report) -> Figure:
    """Draws achieved against requested rates; hollow marks are out of the dial's reach."""
    figure, axes = _panels(len(report.rates.points))
    for axis, (name, points) in zip(axes, report.rates.points.items(), strict=False):
        axis.plot((0, 100), (0, 100), color="#888888", linewidth=1, label="requested")
        for reachable, fill in ((True, BLUE), (False, "white")):
            some = [p for p in points if p.reachable is reachable and p.achieved.value is not None]
            _whiskers(axis, [p.asked for p in some], [p.achieved for p in some], fill)
        axis.set(title=name, xlabel="requested rate (%)", ylabel="refused (%)")
        axis.set_ylim(-2, 102)
    _shared_legend(figure, axes)
    return figure


def cross_talk(pairs: Mapping[str, Mapping[str, CrossTalk]]) -> Figure:
    """Draws the other categories' refused share while one category's rate rises."""
    figure, axes = _panels(len(pairs))
    for axis, (moved, others) in zip(axes, pairs.items(), strict=False):
        for number, other in enumerate(pairs):
            rates = others[other].rates if other in others else ()
            heights = [100 * rate.value for rate in rates if rate.value is not None]
            if heights:
                axis.plot(PERCENT, heights, label=other, **category_look(number))
        axis.set(title=f"dial {moved}", xlabel="its own rate (%)", ylabel="refused (%)")
        axis.set_ylim(-2, 102)
    _shared_legend(figure, axes)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure, axes = blank(rows, columns, (3.9 * columns + 0.6, 3.1 * rows + 0.7))
    for axis in axes[count:]:
        axis.axis("off")
    return figure, axes


def _band(
    axis: Axes, biases: Sequence[float], figures: Sequence[Estimate], label: str, colour: str
) -> None:
    known = [(b, f.value, f.low, f.high) for b, f in zip(biases, figures, strict=True) if f.n]
    if known:
        at, values, low, high = np.array(known, dtype=np.float64).T
        axis.fill_between(at, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0)
        axis.plot(at, 100 * values, color=colour, label=label)


def _whiskers(axis: Axes, asked: Sequence[float], achieved: Sequence[Estimate], fill: str) -> None:
    if asked:
        values, low, high = np.array([(e.value, e.low, e.high) for e in achieved], dtype=float).T
        axis.errorbar(
            100 * np.array(asked),
            100 * values,
            yerr=100 * np.maximum(0, (values - low, high - values)),
            fmt="o",
            color=BLUE,
            markerfacecolor=fill,
            capsize=2,
            label="achieved" if fill == BLUE else "out of reach",
        )


def _finish(axis: Axes, label: str) -> None:
    axis.axvline(0, color=BLACK, linewidth=0.8, linestyle=":")
    axis.set(xlabel=label, ylabel="refused (%)")
    axis.set_ylim(-2, 102)


def _shared_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    drawn: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            drawn.setdefault(label, handle)
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=5, frameon=False)
