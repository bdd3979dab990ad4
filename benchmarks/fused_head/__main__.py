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
import json
import platform
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import bootstrap

# Not defined here: a spawned process does not import a package's `__main__`.
from benchmarks.fused_head.worker import (
    CROSS_ENTROPY,
    FUSED,
    LIGER,
    WAYS,
    Measurement,
    Shape,
    Worker,
    why_no_liger,
)

MEMORY_TARGET, TIME_TARGET = 0.25, 1.1


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
