"""The tables, as Markdown, and the figure."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.results import Aim, Comparison

# A p99 from fewer requests is little more than the slowest of them.
LEAST_FOR_P99 = 300
# Of tables on a terminal.
WIDTH = 200
TITLES = {
    "cost": "What it costs",
    "grid": "Dials on every request, all different, against stock vLLM",
    "features": "What the server can do, against stock vLLM",
    "peers": "What people use instead, against this server with dials",
}


def markdown(
    found: list[Comparison],
    starts: list[dict[str, Any]],
    aims: Iterable[Aim],
    where: dict[str, Any],
) -> str:
    """Returns all tables."""
    parts = [_where(where)]
    for group, title in TITLES.items():
        rows = [c for c in found if c.cell.group == group]
        if rows:
            parts.append(f"### {title}\n\n{_READING}\n\n{table(_HEAD, map(_row, rows))}")
    parts += [f"### Servers\n\n{_servers(starts)}", f"### Aims\n\n{_aims(aims)}"]
    return "\n\n".join(parts) + "\n"


_READING = (
    "The first line of each load has levels; the others have ratios to it, with their 95 % "
    "intervals."
)
_HEAD = ["load", "", "requests/s", "throughput", "HTTP CPU", "first token p50", "p99"]
_HEAD += ["latency p50", "p95", "p99", "added, ms"]


def _row(c: Comparison) -> list[str]:
    per_s = f"{np.median(c.own['per_s']):.1f}"
    if c.name == c.against:
        whole = np.quantile(c.own["whole_ms"], (0.5, 0.95, 0.99))
        first = np.quantile(c.own["first_ms"], (0.5, 0.99))
        levels = [per_s, "1", f"{np.median(c.own['http_us']):.0f} µs"]
        return [c.cell.name, c.name, *levels, *(f"{ms:.1f} ms" for ms in (*first, *whole)), ""]
    p99 = c.samples >= LEAST_FOR_P99
    return [
        "",
        c.name,
        per_s,
        str(c.throughput),
        str(c.http_us),
        str(c.first_token[0.5]) if c.load.stream else "",
        str(c.first_token[0.99]) if c.load.stream and p99 else "",
        str(c.latency[0.5]),
        str(c.latency[0.95]),
        str(c.latency[0.99]) if p99 else "",
        "{:+.2f} ({:+.2f} to {:+.2f})".format(*c.added_ms),
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _servers(starts: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for start in starts for name in start["servers"]))

    def rows() -> Iterator[list[str]]:
        for name in names:
            of_name = [start["servers"][name] for start in starts]
            ready = [found["ready_s"] for found in of_name]
            memory = [found["memory_mb"] for found in of_name]
            yield [
                name,
                *(f"{np.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in (ready, memory)),
            ]
        paper = [rate for start in starts for rate in start["paper"]]
        if paper:
            yield ["paper's procedure", f"{np.median(paper):.1f} prompts/s", ""]

    return table(["", "ready after, s", "memory, MB"], rows())


def _aims(aims: Iterable[Aim]) -> str:
    words = {True: "met", False: "missed", None: "not measured"}
    return table(["aim", "measured", ""], ([a.aim, a.measured, words[a.met]] for a in aims))


def _where(where: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return (
        f"{where['date']}, {where['gpu'] or where['processor']}, {where['cores']} cores, "
        f"{where['memory_gib']} GiB, Linux {where['kernel']}, "
        f"load before {where['load_before']:.1f}; Python {where['python']}, {versions}."
    )


def figure(found: list[Comparison], file: Path) -> None:
    """Draws every throughput ratio with its interval."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [c for c in found if c.name != c.against][::-1]
    ratios = [c.throughput for c in rows]
    middle = np.array([ratio.median for ratio in ratios])
    spread = np.array(
        [
            [ratio.median - ratio.low for ratio in ratios],
            [ratio.high - ratio.median for ratio in ratios],
        ]
    )
    fig, axes = pyplot.subplots(figsize=(8, 0.22 * len(rows) + 1.2), layout="constrained")
    axes.errorbar(middle, range(len(rows)), xerr=np.maximum(spread, 0), fmt="o", markersize=3)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{c.cell.name}: {c.name} / {c.against}" for c in rows])
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("throughput, ratio with 95 % interval over starts and rounds")
    fig.savefig(file, dpi=120)
    pyplot.close(fig)
