"""Rounds of all contenders in turn, start after start; what was measured survives a break.

A round is short and the contenders follow each other, for a machine's own speed changes within
seconds. All servers are started several times, for one start can be faster than the next by more
than the rounds show.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from benchmarks.serving.cells import Cell, Contender, Load, ServerName
from benchmarks.serving.load import WARM_UP, Round, Target, measure, sample_requests
from benchmarks.serving.paper import PaperProcedure
from benchmarks.serving.servers import (
    TENANT_KEY,
    Running,
    Site,
    http_cpu_s,
    memory_mb,
    resumed,
    started,
)
from training.demo_data.render import render

PAPER_BATCH, PAPER_TOKENS = 32, 16
_MEASURED = (Path("benchmarks/serving"), Path("server"), Path("models"))
# Answers that the paper's procedure gives before it counts.
PAPER_WARM_UP = 1


class Plan(NamedTuple):
    """What a run measures.

    Attributes:
        rounds: Of each contender, cell and start; one more warms up.
        paper: Whether the paper's procedure is measured as well.
    """

    cells: list[Cell]
    starts: int
    rounds: int
    paper: bool


def benign_prompts() -> list[str]:
    """Returns prompts that the demo checkpoint answers."""
    return [row["prompt"] for row in render(0)["evaluation"] if row["category"] is None]


@dataclass
class Session:
    """The servers of one start, and the client that measures them."""

    running: Running
    prompts: Iterator[str]
    rng: random.Random

    def cell(self, cell: Cell, rounds: int) -> dict[str, list[Round]]:
        """Measures a cell's contenders round by round; the first round does not count."""
        measured: dict[str, list[Round]] = {contender.name: [] for contender in cell.contenders}
        for turn in range(-1, rounds):
            for contender in in_turn(cell.contenders, turn):
                value = self.round(contender, cell.load)
                if turn >= 0:
                    measured[contender.name].append(value)
        return measured

    def round(self, contender: Contender, load: Load) -> Round:
        """Measures one round of one contender."""
        servers = self.running.servers
        names: list[ServerName] = [contender.server]
        if contender.guard is not None:
            names.append("guard")
        own = load.with_more(contender.more_tokens)
        requests = sample_requests(self.prompts, contender.fields, own, self.rng)
        target = Target(
            servers[contender.server].url,
            servers["guard"].url if contender.guard is not None else None,
            contender.guard == "parallel",
            {"Authorization": f"Bearer {TENANT_KEY}"} if contender.tenant else None,
        )
        with resumed(servers[name] for name in names):
            before_s = sum(http_cpu_s(servers[name]) for name in names)
            found = measure(target, requests, own)
            taken_s = sum(http_cpu_s(servers[name]) for name in names) - before_s
        sent = len(requests) + min(own.at_once, WARM_UP)
        return found._replace(http_us=1e6 * taken_s / sent)


def in_turn(contenders: tuple[Contender, ...], turn: int) -> tuple[Contender, ...]:
    """Returns the order of one turn: each is first in turn, and every other turn is reversed."""
    first = turn % len(contenders)
    order = contenders[first:] + contenders[:first]
    return order[:: 1 if turn % 2 else -1]


def server_names(cells: list[Cell], start: int) -> list[ServerName]:
    """Returns the servers that cells need, each start's in another order."""
    contenders = [contender for cell in cells for contender in cell.contenders]
    names: list[ServerName] = list(dict.fromkeys(contender.server for contender in contenders))
    if any(contender.guard for contender in contenders):
        names.append("guard")
    first = start % len(names)
    return names[first:] + names[:first]


def measure_start(site: Site, plan: Plan, start: int, console: Console) -> dict[str, Any]:
    """Starts all servers once and measures every cell.

    Returns:
        JSON: ``cells`` by number and contender, ``servers`` by name, ``paper``.
    """
    what = f"start {start + 1} of {plan.starts}"
    with (
        console.status(f"{what}: starting the servers"),
        started(site, server_names(plan.cells, start)) as running,
    ):
        session = Session(running, cycle(benign_prompts()), random.Random(start))
        cells = {
            str(number): {
                name: [value._asdict() for value in values]
                for name, values in session.cell(cell, plan.rounds).items()
            }
            for number, cell in enumerate(track(plan.cells, what, console=console))
        }
        servers = {
            name: {"ready_s": running.ready_s[name], "memory_mb": memory_mb(server)}
            for name, server in running.servers.items()
        }
        paper = paper_rates(site, plan.rounds) if plan.paper else []
    return {"cells": cells, "servers": servers, "paper": paper}


def paper_rates(site: Site, rounds: int) -> list[float]:
    """Returns the prompts a second of the paper's procedure, round by round."""
    procedure = PaperProcedure(site.model)
    prompts = benign_prompts()[:PAPER_BATCH]
    rates = [procedure.per_s(prompts, PAPER_TOKENS) for _ in range(PAPER_WARM_UP + rounds)]
    return rates[PAPER_WARM_UP:]


def measure_all(site: Site, plan: Plan, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Measures every start that a file of the folder does not hold already."""
    key = _key(site, plan)
    found = []
    for start in range(plan.starts):
        file = folder / f"start-{start}.json"
        kept = json.loads(file.read_text()) if file.exists() else {}
        if kept.get("key") != key:
            kept = {"key": key, **measure_start(site, plan, start, console)}
            file.write_text(json.dumps(kept))
        found.append(kept)
    return found


def _key(site: Site, plan: Plan) -> str:
    """Returns what names a measurement: what is measured, and the sources that are."""
    # Functions of a plan have addresses, which differ from run to run.
    text = re.sub(r" at 0x[0-9a-f]+", "", repr((plan, site.flags)))
    digest = hashlib.sha256(text.encode())
    for folder in (*_MEASURED, site.model):
        for file in sorted(folder.rglob("*.py" if folder in _MEASURED else "*.safetensors")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
