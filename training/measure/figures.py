"""Figures of a training run: what was minimised, and what the decisions became."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from models.confidence import intervals
from training.measure.metrics import (
    FALSE_REFUSALS,
    Bin,
    refusal_probability,
    refusal_scores,
    reliability,
)
from training.measure.monitor import Measurement

FOLDER = "plots"
DPI = 110
STYLE: Any = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
}
# Okabe and Ito's palette, told apart with every common form of colour blindness.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
CATEGORY_COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
LINE_STYLES = ("-", "--", ":", "-.")
COLUMNS = 3
PERCENTAGES = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Log = Sequence[Mapping[str, Any]]


class Look(NamedTuple):
    """How one logged quantity is drawn."""

    key: str
    label: str
    colour: str
    style: str


class Line(NamedTuple):
    """A logged quantity over the training."""

    look: Look
    steps: list[int]
    values: list[float]


LOSS_PANELS = {
    "Decision: the control token": (
        Look("decision_loss", "training rows", BLUE, "-"),
        Look("eval_vocabulary_loss", "held-out rows", RED, "o-"),
        Look("eval_loss", "held-out rows, among control tokens", GREEN, "s--"),
    ),
    "Text: the tokens behind it": (
        Look("text_loss", "training rows", BLUE, "-"),
        Look("eval_text_loss", "held-out rows", RED, "o-"),
    ),
}
METRIC_LOOKS = (
    Look("eval_auc", "AUC", BLACK, "o-"),
    Look("eval_refused", "refused of what should be", BLUE, "s-"),
    Look("eval_refused_at_5", "the same at 5 % false refusals", GREEN, "^--"),
    Look("eval_right_category", "right category among refused", PURPLE, "D:"),
    Look("eval_falsely_refused", "refused of what should not be", RED, "v-"),
    Look("eval_calibration_error", "calibration error", ORANGE, "x--"),
)


def save_training_plots(
    folder: Path, log_history: Log, measurement: Measurement | None = None
) -> list[Path]:
    """Writes a run's figures as PNG files into `plots` within a folder.

    Args:
        log_history: What the trainer logged; entries without `step` are not looked at.
        measurement: Of the finished model; without it there are only curves over steps.

    Returns:
        The files. A figure for which nothing was logged is not made.
    """
    figures = {"loss": loss_curves(log_history), "history": metric_history(log_history)}
    if measurement is not None:
        to_refuse = np.array([name is not None for name in measurement.truth])
        scores = refusal_scores(measurement.margins)
        figures["margins"] = margin_histograms(measurement)
        figures["reliability"] = reliability_diagram(scores, to_refuse)
        figures["trade_off"] = trade_off(measurement)
    target = folder / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(target / f"{name}.png")
            figure.savefig(written[-1], dpi=DPI)
    return written


def loss_curves(log_history: Log) -> Figure | None:
    """Draws the losses of decision and text, as trained and on held-out rows, where logged."""
    panels = {title: _logged(log_history, looks) for title, looks in LOSS_PANELS.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    figure, axes = blank(1, len(panels), (5.6 * len(panels), 4.0))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        _draw(axis, lines)
        if all(value > 0 for line in lines for value in line.values):
            _logarithmic(axis)
        axis.set(title=title, xlabel="optimiser step", ylabel="mean loss per token (nats)")
        axis.legend(frameon=False)
    return figure


def metric_history(log_history: Log) -> Figure | None:
    """Draws what was measured on held-out rows over the training; None without measurements."""
    lines = _logged(log_history, METRIC_LOOKS)
    if not lines:
        return None
    figure, (axis,) = blank(1, 1, (8.6, 4.4))
    _draw(axis, lines)
    axis.set(
        title="Decisions on held-out rows", xlabel="optimiser step", ylabel="share of the rows"
    )
    axis.set_ylim(-0.02, 1.02)
    _legend_beside(axis)
    return figure


def margin_histograms(measurement: Measurement) -> Figure:
    """Draws, for each category, how its margins lie for its own, other and benign rows."""
    names = measurement.categories
    truth = np.array([name or "" for name in measurement.truth])
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = blank(rows, columns, (max(5.2, 4.0 * columns + 0.6), 2.9 * rows + 0.9))
    for column, name in enumerate(names):
        groups = (
            ("its own rows", truth == name, BLUE, "-"),
            ("rows of other categories", (truth != name) & (truth != ""), ORANGE, "--"),
            ("rows to be answered", truth == "", GREEN, "-"),
        )
        _histograms(axes[column], measurement.margins[:, column], groups)
        axes[column].set(title=name, xlabel="margin (nats)", ylabel="density")
    for axis in axes[len(names) :]:
        axis.axis("off")
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Margins: log-odds of refusing against responding")
    return figure


def reliability_diagram(scores: Floats, to_refuse: Flags, title: str = "Reliability") -> Figure:
    """Draws how often rows of a predicted probability of refusing are to be refused.

    Args:
        scores: `[n]` log-odds of refusing at all, n at least 1.
        to_refuse: `[n]`.
    """
    bins = reliability(scores, to_refuse)
    figure, (upper, lower) = blank(2, 1, (5.4, 6.2), height_ratios=(3, 1), sharex=True)
    upper.plot((0, 1), (0, 1), color="#888888", linewidth=1, label="perfectly calibrated")
    upper.errorbar(
        [entry.predicted for entry in bins],
        [entry.hits / entry.total for entry in bins],
        yerr=np.array([_whiskers(entry) for entry in bins]).T,
        fmt="o",
        color=BLUE,
        markersize=5,
        capsize=2,
        linewidth=1.2,
        label="bins of equal mass, 95 % interval",
    )
    error = sum(b.total * abs(b.predicted - b.hits / b.total) for b in bins) / len(scores)
    upper.set(title=f"{title}: calibration error {error:.3f}", ylabel="share to be refused")
    upper.set_ylim(-0.03, 1.03)
    upper.legend(frameon=False, loc="best")
    probability = refusal_probability(scores)
    for label, members, colour, style in (
        ("to be refused", to_refuse, BLUE, "-"),
        ("to be answered", ~to_refuse, GREEN, "--"),
    ):
        _outline(lower, probability[members], np.linspace(0, 1, 21), label, colour, style)
    _logarithmic(lower, (1,))
    lower.set(xlabel="predicted p(refuse) among the control tokens", ylabel="rows")
    lower.set_xlim(-0.02, 1.02)
    lower.set_ylim(bottom=0.8)
    lower.legend(frameon=False, loc="upper center", fontsize=8)
    return figure


def trade_off(measurement: Measurement) -> Figure | None:
    """Draws what is refused rightly against what is refused falsely, as one common bias moves.

    Returns:
        The figure, None where all rows are of one sort.
    """
    truth = np.array([name or "" for name in measurement.truth])
    # What greedy thresholds: with one bias for all categories the largest margin decides.
    scores = measurement.margins.max(axis=1)
    benign = truth == ""
    if benign.all() or not benign.any():
        return None
    figure, (axis,) = blank(1, 1, (7.4, 4.8))
    for number, name in enumerate(measurement.categories):
        if (truth == name).any() and len(measurement.categories) > 1:
            curve = _trade_off_curve(scores[truth == name], scores[benign])
            axis.step(*curve, where="post", linewidth=1, label=name, **category_look(number))
    curve = _trade_off_curve(scores[~benign], scores[benign])
    axis.step(*curve, where="post", color=BLACK, linewidth=2, label="all rows to be refused")
    trained = [[100 * (scores[rows] >= 0).mean()] for rows in (benign, ~benign)]
    axis.plot(*trained, "o", color=BLACK, markersize=8, markerfacecolor="white", label="as trained")
    axis.axvline(100 * FALSE_REFUSALS, color="#888888", linestyle=":", label="5 % false refusals")
    axis.set(title="Trade-off", ylabel="refused of what should be (%)")
    false_refusal_axis(axis, "refused of what should not be (%)")
    return figure


def category_look(number: int) -> dict[str, Any]:
    """Returns colour and line style of a category."""
    turns = number // len(CATEGORY_COLOURS)
    return {
        "color": CATEGORY_COLOURS[number % len(CATEGORY_COLOURS)],
        "linestyle": LINE_STYLES[turns % len(LINE_STYLES)],
    }


def false_refusal_axis(axis: Axes, label: str) -> None:
    """Spreads the small percentages of a trade-off's x axis; the legend goes beside the axes."""
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(0, 100)
    axis.set_xticks(PERCENTAGES, [f"{tick:g}" for tick in PERCENTAGES])
    axis.minorticks_off()
    axis.set_xlabel(label)
    _legend_beside(axis)


def blank(
    rows: int, columns: int, inches: tuple[float, float], **options: Any
) -> tuple[Figure, list[Axes]]:
    """Returns an empty figure and its axes, row by row."""
    # Without pyplot: nothing global is changed, no window is wanted, nothing is left open.
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _legend_beside(axis: Axes) -> None:
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _logged(log_history: Log, looks: Sequence[Look]) -> list[Line]:
    """Returns those quantities that were logged."""
    lines = []
    for look in looks:
        entries = [entry for entry in log_history if look.key in entry and "step" in entry]
        if entries:
            steps = [int(entry["step"]) for entry in entries]
            lines.append(Line(look, steps, [float(entry[look.key]) for entry in entries]))
    return lines


def _draw(axis: Axes, lines: Sequence[Line]) -> None:
    size: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.4}
    for look, steps, values in lines:
        axis.plot(steps, values, look.style, color=look.colour, label=look.label, **size)


def _trade_off_curve(own: Floats, benign: Floats) -> tuple[Floats, Floats]:
    """Returns percentages refused among benign and own rows, as the threshold falls."""
    thresholds = np.unique(np.concatenate((own, benign)))[::-1]
    falsely = 1 - np.searchsorted(np.sort(benign), thresholds) / len(benign)
    rightly = 1 - np.searchsorted(np.sort(own), thresholds) / len(own)
    return 100 * np.append(0, falsely), 100 * np.append(0, rightly)


def _histograms(axis: Axes, margins: Floats, groups: Sequence[tuple[str, Flags, str, str]]) -> None:
    low, high = min(0.0, float(margins.min())), max(0.0, float(margins.max()))
    edges = np.linspace(low, max(high, low + 1e-6), 41)
    for label, members, colour, style in groups:
        if members.any():
            fill: Any = {"histtype": "stepfilled", "color": colour, "alpha": 0.18}
            axis.hist(margins[members], list(edges), density=True, **fill)
            _outline(axis, margins[members], edges, label, colour, style, density=True)
    axis.axvline(0, color=BLACK, linewidth=1)


def _outline(
    axis: Axes, values: Floats, edges: Floats, label: str, colour: str, style: str, **options: Any
) -> None:
    look: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.4, "label": label}
    axis.hist(values, list(edges), histtype="step", **look, **options)


def _whiskers(entry: Bin) -> tuple[float, float]:
    share = entry.hits / entry.total
    low, high = intervals(entry.hits, entry.total)
    return max(0.0, share - float(low)), max(0.0, float(high) - share)


def _logarithmic(axis: Axes, ticks: tuple[int, ...] = (1, 2, 5)) -> None:
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=ticks))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
