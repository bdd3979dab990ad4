"""A simulation of gateway, replicas and their HTTP processes: first come, first served at each.

Every process has one thread, as nginx's workers and Python's have. Where cores are fewer than busy
processes, all get an equal share.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]


class Costs(NamedTuple):
    """What a request takes, in seconds: half of it on the way in, half on the way out.

    Attributes:
        client: Processor time of a load generator on the same machine; 0: elsewhere.
        gateway: Processor time of nginx.
        http: Processor time of an HTTP process.
        engine: Time in the engine, on other processors; 0: it answers at once, and HTTP's work is
            one piece.
    """

    client: float
    gateway: float
    http: float
    engine: float = 0.0


class Fleet(NamedTuple):
    """What answers.

    Attributes:
        replicas: Servers behind the gateway.
        processes: HTTP processes of each.
        gateways: nginx's workers.
        cores: For all processes together; None: one each.
    """

    replicas: int
    processes: int = 1
    gateways: int = 1
    cores: float | None = None

    @property
    def http_processes(self) -> int:
        """Of all replicas."""
        return self.replicas * self.processes


def capacity(costs: Costs, fleet: Fleet) -> float:
    """Returns the requests a second at which something has no time left."""
    rates = [fleet.http_processes / costs.http]
    if costs.gateway:
        rates.append(fleet.gateways / costs.gateway)
    if costs.client:
        rates.append(1 / costs.client)
    if fleet.cores is not None:
        rates.append(fleet.cores / (costs.client + costs.gateway + costs.http))
    return min(rates)


@dataclass
class _Process:
    waiting: deque[tuple["_Request", float]] = field(default_factory=deque)
    busy: bool = False


class _Request:
    def __init__(self, arrived_s: float) -> None:
        self.arrived_s = arrived_s
        self.replica = 0
        # Processes and work that are left, the next one last; without a process it only waits.
        self.left: list[tuple[_Process | None, float]] = []


class _Machine:
    """Processes that share cores. Time at which they work is slower than the clock's by a rate."""

    def __init__(self, cores: float | None) -> None:
        self._cores = cores
        self._busy = 0
        self._order = count()
        self._ends: list[tuple[float, int, _Process, _Request]] = []
        self._wakes: list[tuple[float, int, _Request]] = []
        self.now_s = 0.0
        self._worked_s = 0.0

    def give(self, process: _Process | None, request: _Request, work_s: float) -> None:
        """Has a process work on a request, after those before."""
        if process is None:
            heapq.heappush(self._wakes, (self.now_s + work_s, next(self._order), request))
        elif process.busy:
            process.waiting.append((request, work_s))
        else:
            process.busy = True
            self._busy += 1
            ends = self._worked_s + work_s
            heapq.heappush(self._ends, (ends, next(self._order), process, request))

    def next_s(self) -> float:
        """Returns when the next request has done a step, by the clock."""
        return min(self._next_end_s(), self._wakes[0][0] if self._wakes else np.inf)

    def go_on_to(self, now_s: float) -> None:
        """Lets time pass in which no step is done."""
        self._worked_s += (now_s - self.now_s) * self._rate()
        self.now_s = now_s

    def end_next(self) -> _Request:
        """Ends what is done next, and returns its request."""
        if self._next_end_s() > self.next_s():
            self.go_on_to(self.next_s())
            return heapq.heappop(self._wakes)[2]
        self.now_s = self._next_end_s()
        self._worked_s, _, process, request = heapq.heappop(self._ends)
        process.busy = False
        self._busy -= 1
        if process.waiting:
            self.give(process, *process.waiting.popleft())
        return request

    def _next_end_s(self) -> float:
        if not self._ends:
            return np.inf
        return self.now_s + (self._ends[0][0] - self._worked_s) / self._rate()

    def _rate(self) -> float:
        if self._cores is None or self._busy <= self._cores:
            return 1.0
        return self._cores / self._busy


def _http_steps(http: _Process, costs: Costs) -> list[tuple[_Process | None, float]]:
    if not costs.engine:
        return [(http, costs.http)]
    return [(http, costs.http / 2), (None, costs.engine), (http, costs.http / 2)]


def at_random(rate: float, requests: int, seed: int = 0) -> Seconds:
    """Returns when requests arrive that have nothing to do with each other (a Poisson process)."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))


def simulate(costs: Costs, fleet: Fleet, arrivals: Seconds, seed: int = 0) -> Seconds:
    """Returns how long each request took, in seconds.

    The gateway gives each request to the replica with the fewest (``least_conn``), where its
    connection leads to one of the processes.

    Args:
        costs: Of a request.
        fleet: What answers.
        arrivals: When each request comes, in seconds; they rise.
        seed: Of all draws.
    """
    rng = random.Random(seed)
    machine = _Machine(fleet.cores)
    client = _Process()
    gateways = [_Process() for _ in range(fleet.gateways)]
    replicas = [[_Process() for _ in range(fleet.processes)] for _ in range(fleet.replicas)]
    held = [0] * fleet.replicas
    took: list[float] = []

    def arrive(request: _Request) -> None:
        gateway = rng.choice(gateways)
        fewest = min(held)
        request.replica = rng.choice([i for i, has in enumerate(held) if has == fewest])
        held[request.replica] += 1
        http = rng.choice(replicas[request.replica])
        steps = [
            (client, costs.client / 2),
            (gateway, costs.gateway / 2),
            *_http_steps(http, costs),
            (gateway, costs.gateway / 2),
            (client, costs.client / 2),
        ]
        request.left = [step for step in reversed(steps) if step[1] > 0]
        go_on(request)

    def go_on(request: _Request) -> None:
        if request.left:
            process, work_s = request.left.pop()
            machine.give(process, request, work_s)
            return
        held[request.replica] -= 1
        took.append(machine.now_s - request.arrived_s)

    for arrived_s in arrivals.tolist():
        while machine.next_s() <= arrived_s:
            go_on(machine.end_next())
        machine.go_on_to(arrived_s)
        arrive(_Request(arrived_s))
    while machine.next_s() < np.inf:
        go_on(machine.end_next())
    return np.array(took)
