"""Where a report goes: terminal, HTML page, model card, gate."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from models.errors import ConfigError
from models.files import write_atomically
from training.evaluation.report import Report, load_report
from training.reports.compare import compare, comparison_table
from training.reports.gate import Bound, check, exit_status, gate_table, read_bounds
from training.reports.table import report_table


class Outputs(NamedTuple):
    """What is wanted of a report beside the table; the folders of all files exist."""

    html: Path | None
    model_card: Path | None
    bounds: list[Bound]


def prepare(
    html: Path | None, model_card: Path | None, gate: Path | None, sets: Collection[str]
) -> Outputs:
    """Checks what can be checked before anything is measured.

    Args:
        sets: The names of the sets that are measured.

    Raises:
        ConfigError: A folder cannot be made, or the gate file is wrong.
    """
    for path in (html, model_card):
        make_folder(path)
    return Outputs(html, model_card, read_bounds(gate, sets) if gate else [])


def make_folder(path: Path | None) -> None:
    """Makes the folder of a file that will be written.

    Raises:
        ConfigError: It cannot be made.
    """
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path}: its folder cannot be made: {error}") from error


def deliver(report: Report, outputs: Outputs, console: Console) -> int:
    """Prints and writes a report, and returns the exit status."""
    console.print(report_table(report))
    if outputs.html is not None:
        from training.reports.page import report_page

        write_atomically(outputs.html, report_page(report))
    if outputs.model_card is not None:
        from training.reports.card import write_card

        write_card(report, outputs.model_card)
    if not outputs.bounds:
        return 0
    outcomes = check(report, outputs.bounds)
    console.print(gate_table(outcomes))
    return exit_status(outcomes)


def deliver_comparison(first: Path, second: Path, out: Path | None, console: Console) -> None:
    """Compares two reports, prints the differences and writes them as JSON."""
    make_folder(out)
    found = compare(load_report(first), load_report(second))
    console.print(comparison_table(found, (first, second)))
    if out is not None:
        write_atomically(out, found.to_json())
