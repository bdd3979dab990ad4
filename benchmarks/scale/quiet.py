"""Measuring on a machine that others use too: a round in which they took much does not count."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import psutil

from benchmarks.scale.load import Found
from benchmarks.scale.replicas import processor_s

# Cores that others may take in a round that counts.
QUIET = 0.1
LIMIT_S = 120.0


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
    load: Callable[[], Found],
    groups: Mapping[str, Sequence[psutil.Process]],
    rounds: int,
    limit_s: float = LIMIT_S,
) -> list[Round]:
    """Repeats a load until enough rounds were quiet, or for a while; then returns the quietest.

    Args:
        load: One round.
        groups: The processes that answer, by name.
        rounds: How many are returned.
        limit_s: How long is waited for quiet rounds.
    """
    found: list[Round] = []
    deadline_s = time.monotonic() + limit_s
    while len(found) < rounds or time.monotonic() < deadline_s:
        found.append(_round(load, groups))
        if sum(each.others < QUIET for each in found) == rounds:
            break
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
