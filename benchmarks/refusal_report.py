"""Tables and figure of the refusal experiment."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.label_noise_report import Interval, Pace, interval, paces
from benchmarks.refusal_training import Training

TOLD = {
    "auc": "AUC",
    "refused_at_5": "refused at 5 % false",
    "calibration_error": "calibration error",
}
POINTS = 100
CROSS_ENTROPY = "cross-entropy"


class Setting(NamedTuple):
    """How a loss is trained.

    Attributes:
        q: See loss/flexible.py; None: `auto` chooses q and gamma.
        gamma: As `q`.
        learning_rate: At the end of the warm-up.
    """

    q: float | None
    gamma: float | None
    learning_rate: float


class Result(NamedTuple):
    """One training of a loss.

    Attributes:
        loss: What the table calls it.
        training: What was trained.
        history: Metrics on the way, with their `step`.
        final: Metrics at the end.
    """

    loss: str
    training: Training
    history: list[dict[str, Any]]
    final: dict[str, float]


class Row(NamedTuple):
    """What came out for one loss; differences are to cross-entropy, paired by seed.

    Attributes:
        loss: What the table calls it.
        setting: What tuning chose.
        seeds: How many.
        members: How often each (q, gamma) was trained.
        final: Of each of `TOLD`.
        gain: The difference of each of `TOLD`.
        pace: Of the mean curves.
    """

    loss: str
    setting: Setting
    seeds: int
    members: dict[str, int]
    final: dict[str, Interval]
    gain: dict[str, Interval]
    pace: Pace


def summary(settings: dict[str, Setting], results: Sequence[Result]) -> list[Row]:
    """Returns a row for each loss that has two seeds at least."""
    plain = {r.training.seed: r for r in results if r.loss == CROSS_ENTROPY}
    by_loss = {loss: [r for r in results if r.loss == loss] for loss in settings}
    return [
        _row(loss, settings[loss], own, [plain[r.training.seed] for r in own])
        for loss, own in by_loss.items()
        if len(own) > 1
    ]


def _row(loss: str, setting: Setting, own: Sequence[Result], plain: Sequence[Result]) -> Row:
    pairs = list(zip(own, plain, strict=True))
    trained = [f"({_told(r.training.q)}, {r.training.gamma:g})" for r in own]
    curves = np.array([[_fine(ce.history), _fine(r.history)] for r, ce in pairs])
    return Row(
        loss,
        setting,
        len(own),
        {member: trained.count(member) for member in sorted(set(trained))},
        {name: interval(np.array([r.final[name] for r in own])) for name in TOLD},
        {
            name: interval(np.array([r.final[name] - ce.final[name] for r, ce in pairs]))
            for name in TOLD
        },
        paces(curves)[1],
    )


def _told(q: float | str) -> str:
    if not isinstance(q, str):
        return f"{q:g}"
    return "{start:g} to {end:g} over {over:g}".format(**json.loads(q))


def _fine(history: Sequence[dict[str, Any]]) -> Any:
    """Returns the area at even steps, on straight lines between what was measured; not at 0."""
    steps = [entry["step"] for entry in history]
    even = np.linspace(0, steps[-1], POINTS + 1)[1:]
    return np.interp(even, steps, [entry["auc"] for entry in history])


def as_markdown(rows: Sequence[Row]) -> str:
    """Returns the two tables: what came out, and the differences to cross-entropy."""
    finals = ["| loss | learning rate | seeds | " + " | ".join(TOLD.values()) + " |"]
    finals.append("|---" * (3 + len(TOLD)) + "|")
    gains = ["| loss | " + " | ".join(TOLD.values()) + " | steps, share of its own | members |"]
    gains.append("|---" * (3 + len(TOLD)) + "|")
    for row in rows:
        shares = " | ".join(_plus_minus(row.final[name]) for name in TOLD)
        finals.append(f"| {row.loss} | {row.setting.learning_rate:g} | {row.seeds} | {shares} |")
        if row.loss != CROSS_ENTROPY:
            told = " | ".join(_plus_minus(row.gain[name], sign="+") for name in TOLD)
            members = ", ".join(f"{member} {times} times" for member, times in row.members.items())
            gains.append(f"| {row.loss} | {told} | {_pace(row.pace)} | {members} |")
    return "\n".join([*finals, "", *gains]) + "\n"


def _plus_minus(value: Interval, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f} ± {value.half:.3f}"


def _pace(pace: Pace) -> str:
    ratio, low, high = ("never" if math.isinf(x) else f"{x:.2f}" for x in pace)
    return f"{ratio} ({low} to {high})"


def as_record(row: Row) -> dict[str, Any]:
    """Returns a row for a JSON file; null stands for never."""
    nested = ("setting", "pace")
    record = {**row._asdict(), **{name: getattr(row, name)._asdict() for name in nested}}
    for name in ("final", "gain"):
        record[name] = {key: value._asdict() for key, value in record[name].items()}
    record["pace"] = {k: v if math.isfinite(v) else None for k, v in record["pace"].items()}
    return record


def draw(results: Sequence[Result], path: Path) -> None:
    """Draws the mean area over the steps of each loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for loss in dict.fromkeys(result.loss for result in results):
        histories = [result.history for result in results if result.loss == loss]
        curves = np.array([[entry["auc"] for entry in history] for history in histories])
        steps = [entry["step"] for entry in histories[0]]
        axes.plot(steps, curves.mean(0), label=f"{loss} ({len(curves)} seeds)")
    axes.set(xlabel="step", ylabel="AUC, refuse against respond, eval.jsonl")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
