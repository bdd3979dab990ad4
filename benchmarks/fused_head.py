"""Peak memory and time of the fused head against losses from all tokens' logits at once.

Each way of computing the loss runs forward and backward in a process of its own, so that no
allocator's leftovers of one count for another. Peak memory is what the process holds at most above
what it held before the forward (hidden states and matrix): on a CPU the kernel's high-water mark of
its resident set, on a GPU CUDA's own. The processes take turns, one at a time, in an order that
changes from round to round; a ratio is taken within a round, and its interval is the bootstrap of
the rounds' median. CPU seconds count all threads of the process: on a machine with other work they
are the fairer figure.
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap
from torch import Tensor
from torch.nn import functional

from loss.flexible import flexible_loss
from loss.fused import fused_flexible_loss

Q, GAMMA = 0.7, 0.5
MEMORY_TARGET, TIME_TARGET = 0.25, 1.1
CROSS_ENTROPY, FLEXIBLE = "cross-entropy, all logits", "flexible, all logits"
FUSED, LIGER = "flexible, fused", "cross-entropy, Liger's fused"


class Shape(NamedTuple):
    """What is computed.

    Attributes:
        tokens: Rows of the hidden states, all of them learnt.
        vocab: Rows of the matrix.
        hidden: Width of both.
        dtype: Of both.
        chunk_tokens: Of the fused head, None for its own choice.
    """

    tokens: int
    vocab: int
    hidden: int
    dtype: str
    chunk_tokens: int | None


class Batch(NamedTuple):
    """One problem.

    Attributes:
        hidden: `[tokens, hidden]`.
        weight: `[vocab, hidden]`.
        targets: `[tokens]`.
        token_weights: `[tokens]`, all 1.
        chunk_tokens: See `Shape`.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    token_weights: Tensor
    chunk_tokens: int | None


class Measurement(NamedTuple):
    """One forward and backward.

    Attributes:
        seconds: By the clock.
        cpu_seconds: Of all threads.
        peak_bytes: Held at most, above what was held before.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def plain_cross_entropy(batch: Batch) -> Tensor:
    """Mean cross-entropy of all logits, as transformers computes it."""
    return functional.cross_entropy(
        functional.linear(batch.hidden, batch.weight).float(), batch.targets
    )


def plain_flexible(batch: Batch) -> Tensor:
    """Mean flexible loss of all logits."""
    logits = functional.linear(batch.hidden, batch.weight).float()
    log_probs = -functional.cross_entropy(logits, batch.targets, reduction="none")
    return flexible_loss(log_probs, Q, GAMMA).mean()


def fused_flexible(batch: Batch) -> Tensor:
    """The same, fused."""
    loss_sum, _ = fused_flexible_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.token_weights,
        Q,
        GAMMA,
        chunk_tokens=batch.chunk_tokens,
    )
    return loss_sum / len(batch.hidden)


def liger_cross_entropy(batch: Batch) -> Tensor:
    """Liger's fused cross-entropy, GPU only."""
    liger = importlib.import_module("liger_kernel.transformers")
    loss = liger.LigerFusedLinearCrossEntropyLoss()
    mean: Tensor = loss(batch.weight, batch.hidden, batch.targets)
    return mean


WAYS: dict[str, Callable[[Batch], Tensor]] = {
    CROSS_ENTROPY: plain_cross_entropy,
    FLEXIBLE: plain_flexible,
    FUSED: fused_flexible,
    LIGER: liger_cross_entropy,
}


def why_no_liger() -> str | None:
    """Returns why Liger cannot be measured here, None if it can."""
    if not torch.cuda.is_available():
        return "Liger is not measured: its kernels need a GPU, and there is none"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger is not measured: `pip install liger-kernel` first"
    return None


def serve(way: str, shape: Shape, threads: int, orders: Connection) -> None:
    """Runs one way forward and backward for every order, in a process of its own.

    Answers each with a `Measurement`; ends at a None.
    """
    torch.set_num_threads(threads)
    batch = _batch(shape)
    # A GPU's allocator and kernels are set up by the size; a CPU only loads its libraries.
    warm = batch if batch.hidden.is_cuda else _batch(shape._replace(tokens=8, vocab=512))
    _measure(WAYS[way], warm)
    while orders.recv() is not None:
        orders.send(_measure(WAYS[way], batch))


def _batch(shape: Shape) -> Batch:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device).to(dtype)

    return Batch(
        normal(shape.tokens, shape.hidden).requires_grad_(),
        (normal(shape.vocab, shape.hidden) / shape.hidden**0.5).requires_grad_(),
        torch.randint(shape.vocab, (shape.tokens,), generator=draw, device=device),
        torch.ones(shape.tokens, device=device),
        shape.chunk_tokens,
    )


def _measure(loss: Callable[[Batch], Tensor], batch: Batch) -> Measurement:
    batch.hidden.grad = batch.weight.grad = None
    before = _reset_peak(batch.hidden)
    began, cpu_began = time.perf_counter(), time.process_time()
    loss(batch).backward()  # type: ignore[no-untyped-call]
    if batch.hidden.is_cuda:
        torch.cuda.synchronize()
    return Measurement(
        time.perf_counter() - began,
        time.process_time() - cpu_began,
        _peak(batch.hidden) - before,
    )


def _reset_peak(tensor: Tensor) -> int:
    """Forgets the high-water mark and returns the bytes that are held now."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


def _peak(tensor: Tensor) -> int:
    return torch.cuda.max_memory_allocated() if tensor.is_cuda else _resident("VmHWM")


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: resident memory is read on Linux only")


class Worker:
    """The process of one way."""

    def __init__(self, way: str, shape: Shape, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(way, shape, threads, theirs))
        self._process.start()
        theirs.close()  # else a process that died would be waited for

    def measure(self) -> Measurement:
        """Runs one forward and backward."""
        self._orders.send("again")
        measurement: Measurement = self._orders.recv()
        return measurement

    def close(self) -> None:
        """Ends the process."""
        if self._process.is_alive():
            self._orders.send(None)
        self._process.join()


def run(shape: Shape, ways: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Measures the ways in turns.

    Returns:
        The rounds' measurements by way and field.
    """
    workers = {way: Worker(way, shape, threads) for way in ways}
    measured: dict[str, Any] = {way: {field: [] for field in Measurement._fields} for way in ways}
    orders = [random.Random(number).sample(ways, len(ways)) for number in range(rounds)]
    turns = [way for order in orders for way in order]
    try:
        for way in track(turns, description=f"hidden {shape.hidden}"):
            for field, value in workers[way].measure()._asdict().items():
                measured[way][field].append(value)
    finally:
        for worker in workers.values():
            worker.close()
    return measured


def ratio(measured: dict[str, Any], way: str, other: str, field: str) -> dict[str, float]:
    """Returns the median of way / other over the rounds, and its 95 % interval."""
    quotients = np.array(measured[way][field]) / np.array(measured[other][field])
    middle = float(np.median(quotients))
    low = high = middle
    if len(set(quotients)) > 1:
        interval = bootstrap(
            (quotients,), np.median, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"ratio": middle, "low": low, "high": high}


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the fused head's ratios to every other way, time and peak memory."""
    return {
        other: {field: ratio(measured, FUSED, other, field) for field in Measurement._fields}
        for other in measured
        if other != FUSED
    }


def _show(console: Console, shape: Shape, measured: dict[str, Any], ratios: Any) -> None:
    table = Table("", "median s", "CPU s", "peak GiB", "fused: time", "CPU time", "memory")
    for way, values in measured.items():
        against = ratios.get(way)
        table.add_row(
            way,
            f"{np.median(values['seconds']):.3f}",
            f"{np.median(values['cpu_seconds']):.3f}",
            f"{np.median(values['peak_bytes']) / 2**30:.2f}",
            _written(against and against["seconds"]),
            _written(against and against["cpu_seconds"]),
            _written(against and against["peak_bytes"]),
        )
    console.print(f"{shape.tokens} tokens x {shape.vocab}, hidden {shape.hidden}, {shape.dtype}")
    console.print(table)
    time_ratio = ratios[CROSS_ENTROPY]["seconds"]["ratio"]
    memory_ratio = ratios[CROSS_ENTROPY]["peak_bytes"]["ratio"]
    console.print(
        f"time {_verdict(time_ratio, TIME_TARGET)}, memory {_verdict(memory_ratio, MEMORY_TARGET)}"
    )


def _written(value: dict[str, float] | None) -> str:
    return f"{value['ratio']:.2f} ({value['low']:.2f} to {value['high']:.2f})" if value else ""


def _verdict(value: float, target: float) -> str:
    relation = "within" if value <= target else "ABOVE"
    return f"{value:.2f} x plain cross-entropy, {relation} the target of {target}"


def main() -> None:
    """Measures, prints the table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--chunk-tokens", type=int)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    chosen = parser.parse_args()
    console = Console()
    no_liger = why_no_liger()
    if no_liger:
        console.print(no_liger)
    ways = [way for way in WAYS if way != LIGER or no_liger is None]
    results = []
    for hidden in chosen.hidden:
        shape = Shape(chosen.tokens, chosen.vocab, hidden, chosen.dtype, chosen.chunk_tokens)
        measured = run(shape, ways, chosen.rounds, chosen.threads)
        ratios = summarise(measured)
        _show(console, shape, measured, ratios)
        results.append(shape._asdict() | {"measured": measured, "fused_to": ratios})
    if chosen.out:
        machine = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        report = {
            "machine": machine,
            "threads": chosen.threads,
            "torch": torch.__version__,
            "rounds": chosen.rounds,
            "liger": no_liger or "measured",
            "results": results,
        }
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
