"""A report as tables for the terminal."""

from rich.table import Table
from rich.text import Text

from training.evaluation.report import Report
from training.evaluation.statistics import Estimate
from training.reports.summary import estimate, sections

MOST_CROSS_TALK = 3


def report_table(report: Report) -> Table:
    """Returns every figure with n and its interval."""
    table = Table(title=Text(f"{report.about.model}: {len(report.records)} prompts"))
    for heading in ("figure", "value", "n", "95 % interval"):
        table.add_column(heading, no_wrap=heading in ("value", "n"))
    for section in sections(report, MOST_CROSS_TALK):
        table.add_section()
        table.add_row(Text(section.title, style="bold"))
        for line in section.lines:
            table.add_row(Text(f"  {line.label}"), *map(Text, cells(estimate(report, line.path))))
    return table


def cells(figure: Estimate) -> tuple[str, str, str]:
    """Returns value, n and interval, or the reason why there is none."""
    if figure.value is None:
        return "-", "-", figure.reason or ""
    number = "{:.1%}" if figure.hits is not None else "{:.4f}"
    ends = (figure.low, figure.high)
    low, high = ("-" if end is None else number.format(end) for end in ends)
    n = f"{figure.n}" if figure.hits is None else f"{figure.hits} / {figure.n}"
    return number.format(figure.value), n, f"{low} to {high}"
