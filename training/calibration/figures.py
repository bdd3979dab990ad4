"""A calibration, drawn: curves, trade-off, reliability of p(refuse), margins."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.calibration import BENIGN, Calibration
from models.curves import CurvePoint, curve
from models.files import write_atomically
from training.measure.figures import (
    BLACK,
    BLUE,
    COLUMNS,
    DPI,
    RED,
    blank,
    category_look,
    false_refusal_axis,
    margin_histograms,
    reliability_diagram,
)
from training.measure.metrics import refusal_scores
from training.measure.monitor import Measurement

POINTS = 201
SENSITIVITIES = (0.0001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999)


def figures(calibration: Calibration) -> dict[str, Figure]:
    """Returns every figure that the calibration's prompts allow, by name.

    Without benign prompts there is no trade-off and no reliability diagram.
    """
    curves = {name: curve(calibration, name, POINTS) for name in calibration.names}
    drawn = {"curves": draw_curves(curves)}
    if calibration.benign:
        drawn["trade-off"] = draw_trade_off(curves)
        scores = refusal_scores(calibration.margins.astype(np.float64))
        drawn["reliability"] = reliability_diagram(
            scores, calibration.category != BENIGN, "Reliability of p(refuse)"
        )
    drawn["margins"] = margin_histograms(_as_measurement(calibration))
    return drawn


def save_figures(calibration: Calibration, folder: Path) -> list[Path]:
    """Writes the figures as `NAME-FIGURE.png` into a folder and returns their paths."""
    written = []
    for name, figure in figures(calibration).items():
        written.append(folder / f"{calibration.info.name}-{name}.png")
        drawing = BytesIO()
        figure.savefig(drawing, dpi=DPI, format="png")
        write_atomically(written[-1], drawing.getvalue())
    return written


def draw_curves(curves: dict[str, list[CurvePoint]]) -> Figure:
    """Draws each category's refused and falsely refused share against its bias.

    Args:
        curves: By category; bias rising, the other categories as trained.
    """
    columns = min(COLUMNS, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = blank(rows, columns, (4.2 * columns + 0.4, 3.4 * rows + 0.8))
    for axis, (name, points) in zip(axes, curves.items(), strict=False):
        _draw_curve(axis, points)
        axis.set(xlabel="bias (nats)", ylabel="refused (%)")
        _sensitivity_axis(axis, name)
    for axis in axes[len(curves) :]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_trade_off(curves: dict[str, list[CurvePoint]]) -> Figure:
    """Draws each category's refused share against its falsely refused one, as its dial moves."""
    figure, (axis,) = blank(1, 1, (7.6, 4.8))
    for number, (name, points) in enumerate(curves.items()):
        look = category_look(number)
        falsely = [100 * (point.false_refusal_rate or 0.0) for point in points]
        rightly = [100 * point.rate for point in points]
        axis.plot(falsely, rightly, linewidth=1.6, label=name, **look)
        trained = min(range(len(points)), key=lambda at: abs(points[at].bias))
        axis.plot(
            falsely[trained], rightly[trained], "o", color=look["color"], markerfacecolor="white"
        )
    axis.plot([], [], "o", color=BLACK, markerfacecolor="white", label="as trained")
    axis.set_ylim(0, 101)
    axis.set(
        title="Trade-off: one category's dial turned, the others as trained",
        ylabel="its own prompts that are refused (%)",
    )
    false_refusal_axis(axis, "benign prompts that its rule refuses (%)")
    return figure


def _draw_curve(axis: Axes, points: Sequence[CurvePoint]) -> None:
    biases = [point.bias for point in points]
    own = [(point.rate, point.rate_interval) for point in points]
    false = [
        (point.false_refusal_rate, point.interval)
        for point in points
        if point.false_refusal_rate is not None and point.interval is not None
    ]
    for label, line, colour, style in (
        ("its own prompts", own, BLUE, "-"),
        ("benign prompts, by its rule", false, RED, "--"),
    ):
        if line:
            low, high = np.array([ends for _, ends in line]).T
            axis.fill_between(biases, 100 * low, 100 * high, color=colour, alpha=0.18, linewidth=0)
            rates = [100 * rate for rate, _ in line]
            axis.plot(biases, rates, style, color=colour, linewidth=1.6, label=label)
    axis.axvline(0, color=BLACK, linewidth=0.8, linestyle=":", label="as trained")
    axis.set_xlim(biases[0], biases[-1])
    axis.set_ylim(0, 101)


def _sensitivity_axis(axis: Axes, title: str) -> None:
    low, high = axis.get_xlim()
    at = [(float(np.log(x / (1 - x))), f"{x:g}") for x in SENSITIVITIES]
    shown = [(bias, label) for bias, label in at if low <= bias <= high]
    top = axis.secondary_xaxis("top")
    top.set_xticks([bias for bias, _ in shown], [label for _, label in shown], fontsize=8)
    top.set_xlabel("sensitivity", fontsize=8)
    axis.set_title(title, fontsize=11, fontweight="bold")


def _as_measurement(calibration: Calibration) -> Measurement:
    names = (*calibration.names, None)  # -1, benign, is the last
    truth = tuple(names[label] for label in calibration.category)
    return Measurement(calibration.margins.astype(np.float64), truth, calibration.names, {})
