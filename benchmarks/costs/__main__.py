"""The cost of each part alone: HTTP layer, logits processors, policies, dials, solver.

Results go to a folder: `results.json` and `tables.md`. Start-up time, memory and huge pages are in
`python -m benchmarks.serving`, whose every start measures them.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from benchmarks.costs.functions import measure_functions
from benchmarks.costs.http_layer import measure_http
from benchmarks.costs.processors import Case, cases, cpu_microseconds
from benchmarks.costs.quiet_steps import STEPS, Quiet, quiet_steps
from benchmarks.serving.machine import machine
from benchmarks.serving.report import WIDTH, table
from benchmarks.serving.servers import Site
from benchmarks.serving.statistics import estimate

PARTS = ("http", "processors", "profile", "functions")
PROFILED = [Case(runner, 32, deciding) for runner in (1, 2) for deciding in (0, 32)]


def http_rows(rates: dict[str, dict[str, list[float]]]) -> Iterator[list[str]]:
    """Yields the HTTP layer's rows: rate of a core, share of stock's, microseconds added."""
    for kind, by_name in rates.items():
        stock = np.array([by_name["stock"]])
        for name, values in by_name.items():
            own = np.array([values])
            added = 1e6 / np.median(own) - 1e6 / np.median(stock)
            ratio = "1" if name == "stock" else str(estimate(own / stock))
            yield [kind, name, f"{np.median(own):.0f}", ratio, f"{added:+.0f}"]


def processor_rows(found: dict[Case, float]) -> Iterator[list[str]]:
    """Yields a row for each runner and size, with nobody, one and all deciding."""
    for runner, rows in dict.fromkeys((case.runner, case.rows) for case in found):
        taken = [found.get(Case(runner, rows, deciding)) for deciding in (0, 1, rows)]
        yield [f"V{runner}", str(rows), *("" if us is None else f"{us:.0f}" for us in taken)]


def profile_rows(found: dict[Case, Quiet]) -> Iterator[list[str]]:
    """Yields a row for each profile."""
    for case, quiet in found.items():
        waits = "no device" if quiet.waits is None else str(quiet.waits)
        yield [
            f"V{case.runner}",
            f"{case.deciding} of {case.rows}",
            str(quiet.tensor_bytes // STEPS),
            str(quiet.python_bytes),
            waits,
            ", ".join(name.removeprefix("aten::") for name in quiet.operators),
        ]


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Returns what each chosen part measured."""
    found: dict[str, Any] = {}
    if "http" in options.parts:
        with TemporaryDirectory() as folder, console.status("HTTP layer"):
            site = Site.made(options.checkpoint, Path(folder))
            found["http"] = measure_http(site, options.rounds, options.requests)
    if "processors" in options.parts:
        found["processors"] = {
            case: cpu_microseconds(options.checkpoint, case, options.steps)
            for case in track(cases(), "processors", console=console)
        }
    if "profile" in options.parts:
        found["profile"] = {case: quiet_steps(options.checkpoint, case) for case in PROFILED}
    if "functions" in options.parts:
        found["functions"] = measure_functions(options.checkpoint, options.calls)
    return found


def tables(found: dict[str, Any]) -> str:
    """Returns what was measured as Markdown."""
    heads: dict[str, tuple[str, list[str], Any]] = {
        "http": (
            "HTTP layer over an engine that answers at once",
            ["", "", "requests a second and core", "of stock's", "added µs"],
            http_rows,
        ),
        "processors": (
            "A step of a logits processor, µs",
            ["runner", "rows", "nobody decides", "one decides", "all decide"],
            processor_rows,
        ),
        "profile": (
            "Profile of a step",
            ["runner", "deciding", "tensor bytes a step", "Python bytes", "waits", "operators"],
            profile_rows,
        ),
        "functions": (
            "Functions, µs",
            ["", "µs"],
            lambda by_name: ([name, f"{us:.1f}"] for name, us in by_name.items()),
        ),
    }
    parts = []
    for part, (title, head, rows) in heads.items():
        if part in found:
            parts.append(f"### {title}\n\n{table(head, rows(found[part]))}")
    return "\n\n".join(parts) + "\n"


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """Returns what was measured, cases as text."""
    written = dict(found)
    for part in written.keys() & {"processors", "profile"}:
        written[part] = [
            case._asdict() | (value._asdict() if isinstance(value, Quiet) else {"us": value})
            for case, value in found[part].items()
        ]
    return written


def main() -> None:
    """Measures, prints the tables and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=20, help="of the HTTP layer")
    parser.add_argument("--requests", type=int, default=100, help="a round and contender")
    parser.add_argument("--steps", type=int, default=50, help="of a logits processor")
    parser.add_argument("--calls", type=int, default=500, help="of a function")
    parser.add_argument("--quick", action="store_true", help="a tenth of all")
    parser.add_argument("--out", type=Path, default=Path("bench/costs"), help="folder of results")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.requests, options.steps, options.calls = 4, 30, 8, 50
    console = Console()
    where = machine()
    torch.set_num_threads(1)  # of small tensors; threads that wait for each other cost more
    found = measure(options, console)
    options.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": where, **as_json(found)}
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "tables.md").write_text(tables(found))
    console.print(Markdown(tables(found)), width=WIDTH)


if __name__ == "__main__":
    main()
