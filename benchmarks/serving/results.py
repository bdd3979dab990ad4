"""From the rounds of all starts to ratios, and which aims they meet."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from benchmarks.serving.cells import Cell, Load
from benchmarks.serving.statistics import (
    Estimate,
    Values,
    added_median,
    estimate,
    quantile_ratios,
)

QUANTILES = (0.5, 0.95, 0.99)


@dataclass(frozen=True)
class Comparison:
    """One contender of one cell beside the cell's first contender.

    Attributes:
        own: By field of ``Round``: ``[starts, rounds]``, times requests for latencies.
        first: Likewise.
    """

    cell: Cell
    name: str
    own: dict[str, Values]
    first: dict[str, Values]

    @property
    def load(self) -> Load:
        """The cell's."""
        return self.cell.load

    @property
    def against(self) -> str:
        """Whom the contender is compared with."""
        return self.cell.contenders[0].name

    @property
    def samples(self) -> int:
        """How many latencies each quantile comes from."""
        return self.own["whole_ms"].size

    @cached_property
    def throughput(self) -> Estimate:
        """Requests a second over the first contender's."""
        return estimate(self.own["per_s"] / self.first["per_s"])

    @cached_property
    def http_us(self) -> Estimate:
        """The HTTP process's CPU time a request over the first contender's."""
        return estimate(self.own["http_us"] / self.first["http_us"])

    @cached_property
    def added_ms(self) -> Estimate:
        """The median latency minus the first contender's."""
        return added_median(self.own["whole_ms"], self.first["whole_ms"])

    @cached_property
    def latency(self) -> dict[float, Estimate]:
        """The whole latency's quantiles over the first contender's."""
        return quantile_ratios(self.own["whole_ms"], self.first["whole_ms"], QUANTILES)

    @cached_property
    def first_token(self) -> dict[float, Estimate]:
        """Likewise for the time to the first token."""
        return quantile_ratios(self.own["first_ms"], self.first["first_ms"], QUANTILES)

    def as_json(self) -> dict[str, Any]:
        """Returns levels and ratios."""
        levels = {
            f"{field}_p{100 * quantile:g}": float(np.quantile(self.own[field], quantile))
            for field in ("first_ms", "whole_ms")
            for quantile in QUANTILES
        }
        found = {
            "group": self.cell.group,
            "cell": self.cell.name,
            "contender": self.name,
            "requests": self.samples,
            "requests_per_s": float(np.median(self.own["per_s"])),
            "http_us": float(np.median(self.own["http_us"])),
            **levels,
        }
        if self.name == self.against:
            return found
        return {
            **found,
            "against": self.against,
            "throughput_ratio": self.throughput._asdict(),
            "http_us_ratio": self.http_us._asdict(),
            "added_ms": self.added_ms._asdict(),
            "latency_ratio": {q: ratio._asdict() for q, ratio in self.latency.items()},
            "first_token_ratio": {q: ratio._asdict() for q, ratio in self.first_token.items()},
        }


def comparisons(cells: list[Cell], starts: list[dict[str, Any]]) -> list[Comparison]:
    """Returns each cell's contenders, the first of them (compared with itself) included."""
    found = []
    for number, cell in enumerate(cells):
        values = {
            contender.name: {
                field: np.array(
                    [
                        [r[field] for r in start["cells"][str(number)][contender.name]]
                        for start in starts
                    ]
                )
                for field in ("per_s", "first_ms", "whole_ms", "http_us")
            }
            for contender in cell.contenders
        }
        first = values[cell.contenders[0].name]
        found += [Comparison(cell, name, own, first) for name, own in values.items()]
    return found


class Aim(NamedTuple):
    """An aim and what was measured.

    Attributes:
        met: None where nothing was measured.
    """

    aim: str
    measured: str
    met: bool | None


def aims(found: list[Comparison], starts: list[dict[str, Any]]) -> list[Aim]:
    """Returns every aim of the benchmark that the cells of a run can tell."""
    return [
        *_aims_of_grid([c for c in found if c.cell.group == "grid" and c.name == "dials"]),
        *_aims_of_contenders(found),
        *_aims_of_servers(starts),
    ]


def _aims_of_grid(grid: list[Comparison]) -> Iterator[Aim]:
    if not grid:
        return
    worst = min(grid, key=lambda c: c.throughput.median)
    reach_one = sum(c.throughput.high >= 1 for c in grid)
    yield Aim(
        "throughput of stock's: 1.00 within the interval of every cell",
        f"{reach_one} of {len(grid)} cells",
        reach_one == len(grid),
    )
    yield Aim(
        "throughput of stock's: never below 0.97",
        f"least {worst.throughput} ({worst.cell.name})",
        worst.throughput.median >= 0.97,
    )
    slowest = max(grid, key=lambda c: c.latency[0.99].median)
    p99 = slowest.latency[0.99]
    yield Aim(
        "p99 latency: stock's over ours never below 0.97",
        f"greatest ours over stock's {p99} ({slowest.cell.name})",
        1 / p99.median >= 0.97,
    )
    for alone in (c for c in grid if (c.load.at_once, c.load.tokens) == (1, 1)):
        if not alone.load.stream:
            yield Aim(
                "one token alone: less than 0.5 ms added",
                f"{alone.added_ms} ms",
                alone.added_ms.median < 0.5,
            )


def _aims_of_contenders(found: list[Comparison]) -> Iterator[Aim]:
    for c in found:
        if c.cell.group == "features" and c.name == "report" and c.load.at_once > 1:
            yield Aim(
                "throughput with reports: 0.97 of stock's",
                str(c.throughput),
                c.throughput.median >= 0.97,
            )
        if c.cell.group == "peers" and c.name == "guard in sequence":
            yield Aim(
                f"twice the guard in sequence ({c.cell.name})",
                f"{1 / c.throughput.median:.2f} times its throughput",
                1 / c.throughput.median >= 2,
            )


def _aims_of_servers(starts: list[dict[str, Any]]) -> Iterator[Aim]:
    servers = [start["servers"] for start in starts]
    if not all({"stock", "rheostat"} <= found.keys() for found in servers):
        return
    for field, unit, most in (("ready_s", "s", 2.0), ("memory_mb", "MB", 50.0)):
        added = [found["rheostat"][field] - found["stock"][field] for found in servers]
        what = "start" if field == "ready_s" else "memory"
        yield Aim(
            f"{what}: within {most:g} {unit} of stock",
            f"{np.median(added):+.1f} {unit} ({min(added):+.1f} to {max(added):+.1f})",
            bool(np.median(added) <= most),
        )


def paper_aim(found: list[Comparison], starts: list[dict[str, Any]]) -> Iterator[Aim]:
    """Yields the aim about the paper's procedure, where it was measured."""
    paper = [rate for start in starts for rate in start["paper"]]
    ours = [
        c for c in found if c.cell.group == "peers" and c.name == "dials" and c.load.at_once > 1
    ]
    if paper and ours:
        ratio = float(np.median(ours[0].own["per_s"]) / np.median(paper))
        yield Aim("twenty times the paper's procedure", f"{ratio:.1f} times", ratio >= 20)
