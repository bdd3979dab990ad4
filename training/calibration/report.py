"""What a calibration says, in a table for the terminal and on a page for people."""

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import UTC
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from models.calibration import Calibration
from models.errors import ConfigError, RequestError
from models.solver import Expected, Interval, Solution, Target, solve
from training.calibration.figures import figures
from training.measure.figures import DPI

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

RATES = tuple(step / 10 for step in range(1, 10))
BOUNDS = (0.005, 0.01, 0.02, 0.05)

CAPTIONS = {
    "curves": "What a category's bias does, the other categories as trained: the share of its own "
    "prompts that is refused, by whichever token, and the share of benign prompts that its own "
    "rule refuses. Bands are 95 % intervals of this many prompts. The upper scale shows the same "
    "bias as a sensitivity.",
    "trade-off": "Each curve is one category's dial, turned from never to always. The nearer to "
    "the upper left corner, the better the checkpoint tells that category from benign prompts; no "
    "bias changes the curve.",
    "reliability": "Of prompts that the model gives about the same probability of being refused, "
    "how many ought to be. On the diagonal the probability means what it says. Rates do not need "
    "that: they are read off the margins.",
    "margins": "Where the margins lie that the biases are read off.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff;
       max-width: 1040px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, figcaption { max-width: 46rem; } figure { margin: 1.5rem 0; } figcaption { color: #57606a; }
img { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #d8dee4; text-align: right; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; } td.warn { color: #9a3412; } code { font-size: .85rem; }
small { color: #57606a; display: block; }
"""

Cell = str | tuple[str, str]


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


def save_report(calibration: Calibration, path: Path) -> None:
    """Writes a self-contained HTML page: figures, tables, where everything comes from.

    Raises:
        ConfigError: The file cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        # Opened first: what cannot be written need not be drawn.
        with partial.open("w", encoding="utf-8") as file:
            file.write(report(calibration))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def report(calibration: Calibration) -> str:
    """Returns the page as HTML that fetches nothing."""
    title = f"Calibration {calibration.info.name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p><small>{escape(_origin(calibration))}</small></p>",
        *_as_trained(calibration),
        *_pictures(figures(calibration)),
        *_rates(calibration),
        *_bounds(calibration),
        *_provenance(calibration),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _origin(calibration: Calibration) -> str:
    when = calibration.info.created.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    prompts = sum(calibration.prompts.values())
    return (
        f"Measured {when}, rheostat {calibration.info.rheostat}: {prompts} prompts in "
        f"{len(calibration.names)} categories, {calibration.benign} benign ones. Decision rule: "
        "greedy."
    )


def _as_trained(calibration: Calibration) -> list[str]:
    solution = solve(calibration, {})
    rows: list[list[Cell]] = [
        [
            name,
            str(calibration.prompts[name]),
            _percent(expected.rate),
            _interval(expected.rate_interval),
            _percent(expected.false_refusal_rate),
            _interval(expected.false_refusal_interval),
        ]
        for name, expected in zip(calibration.names, solution.expected, strict=True)
    ]
    ends = solution.total_false_refusal_interval
    total = _percent(solution.total_false_refusal_rate)
    rows.append(["by any of them", str(calibration.benign), "", "", total, _interval(ends)])
    heads = ("category", "prompts", "refused", "95 %", "benign refused by its rule", "95 %")
    return ["<h2>As trained</h2>", _table(heads, rows)]


def _pictures(drawn: Mapping[str, "Figure"]) -> list[str]:
    parts = []
    for name, figure in drawn.items():
        file = BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        data = base64.b64encode(file.getvalue()).decode()
        parts.append(
            f"<h2>{escape(name.capitalize())}</h2>\n<figure>"
            f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>"
        )
    return parts


def _rates(calibration: Calibration) -> list[str]:
    names = calibration.names
    alone = [[solve(calibration, {name: Target(rate=rate)}) for name in names] for rate in RATES]
    parts = [
        "<h2>From rates to biases</h2>",
        "<p>The bias that refuses a share of a category's own prompts, asked for alone. Below it: "
        "the rate with its 95 % interval, and what share of the benign prompts its rule then "
        "refuses. A rate that cannot be reached is marked; the nearest one is shown.</p>",
        _table(
            ("rate", *names),
            [
                [f"{rate:.0%}", *(_cell(row[at], at) for at in range(len(names)))]
                for rate, row in zip(RATES, alone, strict=True)
            ],
        ),
    ]
    if len(names) == 1:
        return parts
    together = [solve(calibration, {name: Target(rate=rate) for name in names}) for rate in RATES]
    return [
        *parts,
        "<p>All categories asked for the same rate at once; what one refuses of another's prompts "
        "is taken into account.</p>",
        _table(
            ("rate", *names, "benign, in all"),
            [
                [
                    f"{rate:.0%}",
                    *(_cell(solution, at) for at in range(len(names))),
                    _percent(solution.total_false_refusal_rate),
                ]
                for rate, solution in zip(RATES, together, strict=True)
            ],
        ),
    ]


def _bounds(calibration: Calibration) -> list[str]:
    if not calibration.benign:
        return []
    names = calibration.names
    rows: list[list[Cell]] = []
    for bound in BOUNDS:
        target = Target(false_refusal_rate=bound)
        cells = [_bounded(calibration, at, {n: target}, None) for at, n in enumerate(names)]
        rows.append([f"{bound:.1%}", *cells, _bounded(calibration, None, {}, bound)])
    return [
        "<h2>From bounds on false refusals to biases</h2>",
        "<p>The largest bias that keeps the share of benign prompts refused below a bound with "
        "95 % confidence, for one category's rule; last, one bias for all categories and the "
        "bound for all of them together. Below it: the share of the category's own prompts that "
        "is then refused.</p>",
        _table(("bound", *names, "all together"), rows),
    ]


def _bounded(
    calibration: Calibration, at: int | None, targets: Mapping[str, Target], total: float | None
) -> Cell:
    try:
        solution = solve(calibration, targets, total)
    except RequestError as error:
        return error.message, "warn"
    if at is not None:
        return f"{_bias(solution.biases[at])}|refuses {_percent(solution.expected[at].rate)}"
    own = np.array([expected.rate for expected in solution.expected])
    return f"{_bias(solution.biases[0])}|refuses {own.min():.0%} to {own.max():.0%}"


def _provenance(calibration: Calibration) -> list[str]:
    info = calibration.info
    entries = {
        **{f"{what}, SHA-256": digest for what, digest in info.hashes.model_dump().items()},
        **{f"data: {name}": digest for name, digest in info.data_sha256.items()},
        **{f"seed: {what}": str(seed) for what, seed in info.seeds.items()},
    }
    rows: list[list[Cell]] = [[key, (value, "text")] for key, value in entries.items()]
    return ["<h2>Where this comes from</h2>", _table(("what", "value"), rows)]


def _cell(solution: Solution, at: int) -> Cell:
    expected: Expected = solution.expected[at]
    text = f"{_bias(solution.biases[at])}|{_percent(expected.rate)} "
    text += f"({_interval(expected.rate_interval)})"
    if expected.false_refusal_rate is not None:
        text += f"|benign {_percent(expected.false_refusal_rate)}"
    return text if expected.reachable else (f"{text}|not reachable", "warn")


def _table(heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "\n".join(f"<tr>{''.join(_td(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _td(cell: Cell) -> str:
    text, kind = cell if isinstance(cell, tuple) else (cell, "")
    first, *more = text.split("|")
    inner = escape(first) + "".join(f"<small>{escape(part)}</small>" for part in more)
    return f'<td class="{kind}">{inner}</td>' if kind else f"<td>{inner}</td>"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _interval(ends: Interval | None) -> str:
    return "-" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"


def _bias(bias: float) -> str:
    if math.isinf(bias):
        return "always" if bias > 0 else "never"
    return f"{bias:+.2f}"
