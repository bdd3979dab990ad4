"""What it costs to turn rates into biases, as on the request path, without the server's cache.

Synthetic margins: a prompt's own token near 0, the others and benign prompts 5 below, standard
deviation 2. Every round asks for something else, so nothing is solved twice. `first` is the first
solve of a rule on a calibration, which lays the margins out; times are the process's own CPU
seconds, which a busy machine disturbs least.
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.calibration import BENIGN, Calibration, CalibrationInfo, load_calibration
from models.controls import Rule
from models.hashes import Hashes
from models.solver import Target, solve

RULES = {"greedy": Rule.GREEDY, "sample": Rule.SAMPLE, "paper": Rule.PAPER}
NAMES = ("humanizing", "incomplete", "indeterminate", "safety", "unsupported")
Asked = tuple[dict[str, Target], float | None]


class Cost(NamedTuple):
    """CPU milliseconds of one solve.

    Attributes:
        first: The first one.
        median: Of the others.
        p95: Of the others.
    """

    first: float
    median: float
    p95: float


def synthetic(prompts: int, benign: int) -> Calibration:
    """Returns a calibration of five categories."""
    rng = np.random.default_rng(0)
    category = np.repeat(np.arange(-1, 5), [benign, *[prompts] * 5])
    margins = rng.normal(-5.0, 2.0, (len(category), 5))
    own = np.flatnonzero(category != BENIGN)
    margins[own, category[own]] += 5.0
    nothing = Hashes(weights="", template="", tokenizer="")
    return Calibration(
        margins=margins.astype(np.float32),
        log_normaliser=np.log(1.5 + np.exp(margins).sum(axis=1)).astype(np.float32),
        category=category,
        info=CalibrationInfo(
            name="synthetic",
            created=datetime.now(UTC),
            categories=NAMES,
            hashes=nothing,
            rheostat="",
        ),
    )


def all_rates(names: tuple[str, ...], rng: np.random.Generator) -> Asked:
    """A rate in every category."""
    return {name: Target(rate=float(rng.uniform(0.1, 0.9))) for name in names}, None


def all_limits(names: tuple[str, ...], rng: np.random.Generator) -> Asked:
    """A false refusal rate in every category."""
    limits = rng.uniform(0.01, 0.1, len(names))
    return {
        n: Target(false_refusal_rate=float(x)) for n, x in zip(names, limits, strict=True)
    }, None


def total(_names: tuple[str, ...], rng: np.random.Generator) -> Asked:
    """A false refusal rate in total."""
    return {}, float(rng.uniform(0.01, 0.1))


def mixed(names: tuple[str, ...], rng: np.random.Generator) -> Asked:
    """A rate, a false refusal rate, a bias, and a total for the rest."""
    kinds = (
        Target(rate=float(rng.uniform(0.4, 0.8))),
        Target(false_refusal_rate=float(rng.uniform(0.01, 0.03))),
        Target(bias=-2.0),
    )
    return dict(zip(names, kinds, strict=False)), float(rng.uniform(0.2, 0.3))


QUESTIONS: dict[str, Callable[[tuple[str, ...], np.random.Generator], Asked]] = {
    "rates": all_rates,
    "false refusals": all_limits,
    "in total": total,
    "mixed, with a total": mixed,
}


def measure(calibration: Calibration, rule: Rule, question: str, rounds: int) -> Cost:
    """Solves other numbers in every round."""
    rng = np.random.default_rng(1)
    # The layout is kept per calibration object: a copy starts anew.
    fresh = Calibration(
        calibration.margins, calibration.log_normaliser, calibration.category, calibration.info
    )
    spent = []
    for _ in range(rounds + 1):
        targets, limit = QUESTIONS[question](fresh.names, rng)
        start = time.process_time()
        solve(fresh, targets, rule=rule, temperature=1.0, total_false_refusal_rate=limit)
        spent.append(1000 * (time.process_time() - start))
    return Cost(spent[0], float(np.median(spent[1:])), float(np.quantile(spent[1:], 0.95)))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, help="a file instead of synthetic margins")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, help="also write the figures there as JSON")
    arguments = parser.parse_args()
    if arguments.calibration:
        calibrations = {arguments.calibration.stem: load_calibration(arguments.calibration)}
    else:
        sizes = ((600, 1500), (5000, 5000))
        calibrations = {f"5 x {n} + {b}": synthetic(n, b) for n, b in sizes}
    # scipy is imported by the first solve of a process.
    measure(next(iter(calibrations.values())), Rule.SAMPLE, "false refusals", 1)
    cells = [(s, r, q) for s in calibrations for r in RULES for q in QUESTIONS]
    table = Table(title="CPU milliseconds to solve")
    for column in ("prompts", "rule", "asked", "first", "median", "95 %"):
        table.add_column(column, justify="right" if column in Cost._fields else "left")
    results = []
    console = Console()
    for size, rule, question in track(cells, "solving", console=console):
        cost = measure(calibrations[size], RULES[rule], question, arguments.rounds)
        table.add_row(size, rule, question, *(f"{value:.2f}" for value in cost))
        results.append({"prompts": size, "rule": rule, "asked": question, **cost._asdict()})
    console.print(table)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
