"""Measuring on a machine that others use too: a round in which they took much does not count."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import psutil

from benchmarks.scale.load import Found
from benchmarks.scale.replicas import processor_s

ATTEMPTS = 6


class Round(NamedTuple):
    """One round of a load.

    Attributes:
        found: What became of it.
        taken_s: Processor time of a request, by group of processes.
        others: Cores that other processes took.
    """

    found: Found
    taken_s: dict[str, float]
    others: float


def quietest(
    load: Callable[[], Found], groups: Mapping[str, Sequence[psutil.Process]], rounds: int
) -> list[Round]:
    """Repeats a load, and returns the rounds in which other processes took the least.

    Args:
        load: One round.
        groups: The processes that answer, by name.
        rounds: How many are returned.
    """
    found = [_round(load, groups) for _ in range(ATTEMPTS * rounds)]
    return sorted(found, key=lambda each: each.others)[:rounds]


def _round(load: Callable[[], Found], groups: Mapping[str, Sequence[psutil.Process]]) -> Round:
    busy_s = _busy_s()
    before_s = {name: processor_s(processes) for name, processes in groups.items()}
    found = load()
    own_s = {name: processor_s(processes) - before_s[name] for name, processes in groups.items()}
    others_s = _busy_s() - busy_s - sum(own_s.values()) - found.client_s
    count = len(found.latencies_s)
    taken_s = {name: seconds / count for name, seconds in own_s.items()}
    return Round(found, taken_s, max(0.0, others_s) / found.seconds)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)
