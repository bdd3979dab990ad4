"""A profile of steps in which nobody decides: they allocate nothing and wait for no device."""

import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.costs.processors import VOCABULARY, Batch, Case

STEPS = 50
# What a profile of a GPU shows where the host waits for it. It ends with two: one is ours.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
OWN_WAITS = 2


class Quiet(NamedTuple):
    """What the profile of ``STEPS`` steps shows.

    Attributes:
        tensor_bytes: Allocated by torch, on host and device.
        python_bytes: More memory of Python's than before, at its most.
        waits: Calls that wait for the device; None without one.
        operators: Of torch, in each step.
    """

    tensor_bytes: int
    python_bytes: int
    waits: int | None
    operators: list[str]


def quiet_steps(checkpoint: Path, case: Case, device: str = "cpu") -> Quiet:
    """Profiles a batch's steps.

    Args:
        case: Its size; with rows that decide, to see what they cost.
    """
    batch = Batch(checkpoint, case, device)
    logits = torch.randn(case.rows, VOCABULARY, device=device)
    _run(batch, logits)
    activities = [ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as profiled:
        _run(batch, logits)
    events = profiled.events() or []
    # A masked column's value is a scalar of 0 bytes of torch's; whatever it allocates counts.
    allocated = sum(max(0, _own_bytes(event)) for event in events)
    names = [event.name for event in events]
    return Quiet(
        allocated,
        _python_bytes(batch, logits),
        None if device == "cpu" else sum(names.count(name) for name in WAITS) - OWN_WAITS,
        sorted({name for name in names if name.startswith("aten::")}),
    )


def _own_bytes(event: Any) -> int:
    return int(event.self_cpu_memory_usage) + int(event.self_device_memory_usage)


def _python_bytes(batch: Batch, logits: torch.Tensor) -> int:
    tracemalloc.start()
    try:
        _run(batch, logits)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        _run(batch, logits)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _run(batch: Batch, logits: torch.Tensor) -> None:
    for _ in range(STEPS):
        batch.prepare()
        batch.step(logits)
    if logits.is_cuda:
        torch.cuda.synchronize()
