"""Throughput, time to first token and latency against stock vLLM and against other procedures.

Every contender serves the same checkpoint. Stock decodes a control token like any other and is
given one token more, so all run as many decoding steps. Results go to a folder: `results.json`,
`tables.md`, `figure.png`, and one file a start, which a second run with the same options reads
instead of measuring that start again.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.serving.cells import (
    AT_ONCE,
    TOKENS,
    Cell,
    contenders,
    cost,
    features,
    grid,
    peers,
)
from benchmarks.serving.machine import machine
from benchmarks.serving.report import WIDTH, figure, markdown
from benchmarks.serving.results import aims, comparisons, paper_aim
from benchmarks.serving.rounds import Plan, benign_prompts, measure_all
from benchmarks.serving.servers import CPU_FLAGS, Site
from models.manifest import load_manifest

GROUPS = ("cost", "grid", "features", "peers")
# About 400 tokens of the demo checkpoint.
SYSTEM_CHARACTERS = 1200


def system_prompt() -> str:
    """Returns a long system prompt."""
    return " ".join(benign_prompts())[:SYSTEM_CHARACTERS]


def cells_of(options: argparse.Namespace) -> list[Cell]:
    """Returns the cells of the chosen groups."""
    manifest = load_manifest(options.checkpoint)
    ids = tuple(manifest.control_ids)
    known = contenders(tuple(manifest.names), ids, manifest.respond.token)
    other = options.against is not None
    others = ("other checkout",) if other else ()
    loads = tuple(options.at_once), tuple(options.tokens)
    groups = {
        "cost": cost(known, options.round_s, other=other),
        "grid": grid(known, options.round_s, others, *loads),
        "features": features(known, options.round_s, system_prompt()),
        "peers": peers(known, options.round_s),
    }
    return [cell for group in options.groups for cell in groups[group]]


def parser(**defaults: object) -> argparse.ArgumentParser:
    """Returns the options; ``defaults`` replace theirs."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    made.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS[1:]))
    made.add_argument("--starts", type=int, default=4, help="of all servers")
    made.add_argument("--rounds", type=int, default=3, help="a start, cell and contender")
    made.add_argument("--round-s", type=float, default=0.5, help="about how long a round lasts")
    made.add_argument("--at-once", type=int, nargs="+", default=AT_ONCE, help="of the grid")
    made.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of the grid")
    made.add_argument("--quick", action="store_true", help="2 starts of 2 rounds of 0.25 s")
    made.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout of this project"
    )
    made.add_argument("--out", type=Path, default=Path("bench/serving"), help="folder of results")
    made.set_defaults(**defaults)
    return made


def run(
    options: argparse.Namespace, flags: tuple[str, ...] = CPU_FLAGS, *, together: bool = False
) -> None:
    """Measures, prints the tables and writes the results.

    Args:
        options: As parsed.
        flags: vLLM's, of every server.
        together: Whether the servers start at once.
    """
    if options.quick:
        options.starts, options.rounds, options.round_s = 2, 2, 0.25
    console = Console()
    where = machine()
    options.out.mkdir(parents=True, exist_ok=True)
    cells = cells_of(options)
    plan = Plan(cells, options.starts, options.rounds, "peers" in options.groups)
    with TemporaryDirectory() as folder:
        site = Site.made(
            options.checkpoint, Path(folder), flags, options.against, together=together
        )
        starts = measure_all(site, plan, options.out, console)
    found = comparisons(cells, starts)
    judged = [*aims(found, starts), *paper_aim(found, starts)]
    tables = markdown(found, starts, judged, where)
    results = {
        "machine": where,
        "cells": [comparison.as_json() for comparison in found],
        "servers": [start["servers"] for start in starts],
        "paper_per_s": [start["paper"] for start in starts],
        "aims": [aim._asdict() for aim in judged],
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "tables.md").write_text(tables)
    figure(found, options.out / "figure.png")
    console.print(Markdown(tables), width=WIDTH)


if __name__ == "__main__":
    run(parser().parse_args())
