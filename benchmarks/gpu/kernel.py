"""The time of the V2 processor within a step, by CUDA events, and that it never waits."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.costs.processors import ROWS, Batch, Case
from benchmarks.costs.quiet_steps import quiet_steps
from models.manifest import load_manifest
from server.generation.margins import MarginBoard, Ticket

STEPS = 100
VOCABULARY = 128_256
# The device sleeps so long before a step that the host has sent all of it when it wakes.
SLEEP_CYCLES = 8_000_000


class Step(NamedTuple):
    """Medians of a step's time.

    Attributes:
        device_us: On the device, by CUDA events; None on a CPU.
        host_us: Until the host may go on.
    """

    device_us: float | None
    host_us: float


def measure_kernel(checkpoint: Path, device: str) -> dict[str, Any]:
    """Returns every size's times, profiles, and whether a step waits for the device."""
    runner = 1 if device == "cpu" else 2
    torch.set_num_threads(1)  # what a CPU does here is small
    rows = ROWS if device != "cpu" else ROWS[:3]
    cases = [
        Case(runner, count, deciding) for count in rows for deciding in dict.fromkeys((0, 1, count))
    ]
    profiled = [Case(runner, 32, 0), Case(runner, 32, 32)]
    return {
        "steps": [case._asdict() | timed(checkpoint, case, device)._asdict() for case in cases],
        "profile": [
            case._asdict() | quiet_steps(checkpoint, case, device)._asdict() for case in profiled
        ],
        "waits": waits(checkpoint, device),
    }


def timed(checkpoint: Path, case: Case, device: str) -> Step:
    """Times one size's steps."""
    batch = Batch(checkpoint, case, device)
    logits = torch.randn(case.rows, VOCABULARY, device=device)

    def step() -> None:
        batch.prepare()
        batch.step(logits)

    for _ in range(5):
        step()
    if device == "cpu":
        return Step(None, float(np.median([_host_us(step) for _ in range(STEPS // 10)])))
    taken = [_events(step) for _ in range(STEPS)]
    on_device, on_host = zip(*taken, strict=True)
    return Step(float(np.median(on_device)), float(np.median(on_host)))


def _events(step: Callable[[], None]) -> tuple[float, float]:
    event: Any = torch.cuda.Event  # torch leaves it without annotations
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    host_us = _host_us(step)
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end), host_us


def _host_us(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - start)


def waits(checkpoint: Path, device: str) -> str:
    """Returns what torch says to a step that may not wait: ``none``, or the call that did.

    All rows decide and write their margins to memory shared with the server.
    """
    if device == "cpu":
        return "no device"
    board = MarginBoard(len(load_manifest(checkpoint).names))
    tickets = tuple(Ticket(board._path, row, row + 1) for row in range(8))
    batch = Batch(checkpoint, Case(2, 8, 8), device, tickets)
    logits = torch.randn(8, VOCABULARY, device=device)
    batch.prepare()
    batch.step(logits)  # maps the shared memory, once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.prepare()
        batch.step(logits)
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        with suppress(OSError):
            board.close()
    return "none"
