"""What a calibration says of a checkpoint as it was trained, as a table for the terminal."""

from typing import TYPE_CHECKING, Literal

from models.calibration import Calibration
from models.solver import Interval, solve

if TYPE_CHECKING:
    from rich.table import Table


def summary(calibration: Calibration) -> "Table":
    """Returns what a calibration says of the checkpoint as it was trained, for the terminal."""
    from rich.table import Table

    solution = solve(calibration, {})
    benign = f"{calibration.benign} benign prompts"
    table = Table(
        title=f"calibration {calibration.info.name!r}: as trained, before any dial",
        caption=benign
        if calibration.benign
        else "no benign prompts: rates can be asked for, false refusal rates cannot",
    )
    for heading in ("category", "prompts", "refused", "95 %", "benign", "95 %"):
        justify: Literal["left", "right"] = "left" if heading == "category" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for name, expected in zip(calibration.names, solution.expected, strict=True):
        table.add_row(
            name,
            str(calibration.prompts[name]),
            _percent(expected.rate),
            _interval(expected.rate_interval),
            _percent(expected.false_refusal_rate),
            _interval(expected.false_refusal_interval),
        )
    total, ends = solution.total_false_refusal_rate, solution.total_false_refusal_interval
    table.add_section()
    table.add_row("by any of them", "", "", "", _percent(total), _interval(ends))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _interval(ends: Interval | None) -> str:
    return "-" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
