"""Correctness and speed on a GPU, in one command.

Needs one NVIDIA GPU, torch, vLLM and no network. Each part's result is a file of the folder of
results; a part whose file is there is not measured again. `--device cpu` rehearses what a CPU can.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.fused_head.__main__ import run as run_losses
from benchmarks.fused_head.__main__ import summarise
from benchmarks.fused_head.worker import LIGER, WAYS, Shape, why_no_liger
from benchmarks.gpu.correctness import Run, measure_correctness
from benchmarks.gpu.kernel import measure_kernel
from benchmarks.gpu.report import markdown
from benchmarks.gpu.scenarios import Machine
from benchmarks.gpu.speed import measure_speed
from benchmarks.serving.machine import machine as describe_machine
from benchmarks.serving.report import WIDTH

PARTS = ("correctness", "kernel", "speed", "large", "loss")
# Two computations of one margin in float32; a GPU may round attention to fewer bits.
TOLERANCE = {"cpu": 1e-3, "interpreted": 1e-3, "cuda": 1e-2}


def measure_loss(device: str) -> dict[str, Any]:
    """Returns the fused loss beside plain cross-entropy and Liger's fused one."""
    on_gpu = device != "cpu"
    shape = Shape(8192, 128_256, 4096, "bfloat16", None)
    if not on_gpu:
        shape = Shape(256, 8192, 128, "float32", None)
    no_liger = why_no_liger()
    ways = [way for way in WAYS if way != LIGER or no_liger is None]
    measured = run_losses(shape, ways, 5 if on_gpu else 2, os.cpu_count() or 1)
    result = {**shape._asdict(), "measured": measured, "fused_to": summarise(measured)}
    return {"results": [result], "liger": no_liger or "measured"}


def parser() -> argparse.ArgumentParser:
    """Returns the options."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--model", type=Path, required=True, help="a checkpoint with its manifest")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--device", choices=("cuda", "cpu", "interpreted"), default="cuda")
    made.add_argument("--requests", type=int, default=256, help="at once, of each engine")
    made.add_argument("--prompts", type=int, default=32, help="different ones")
    made.add_argument("--tolerance", type=float, help="of a margin, before a decision is near")
    made.add_argument("--out", type=Path, default=Path("bench/gpu"), help="folder of results")
    made.add_argument("--flags", default="", help="more of vLLM's for every engine, in one text")
    return made


def measures(
    options: argparse.Namespace, where: Machine, console: Console
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Returns what measures each part."""
    tolerance = options.tolerance or TOLERANCE[options.device]
    size = Run(options.requests, options.prompts, tolerance)
    out = options.out
    return {
        "correctness": lambda: measure_correctness(
            where, options.model, size, out / "logs", console
        ),
        "kernel": lambda: measure_kernel(options.model, options.device),
        "speed": lambda: measure_speed(where, options.model, out / "speed", large=False),
        "large": lambda: measure_speed(where, options.model, out / "large", large=True),
        "loss": lambda: measure_loss(options.device),
    }


def results(folder: Path) -> dict[str, Any]:
    """Returns what the folder's files say about all parts."""
    files = {name: folder / f"{name}.json" for name in PARTS}
    kept = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    return {
        "machine": describe_machine(),
        "parts": {name: one["part"] for name, one in kept.items()},
        "seconds": {name: one["seconds"] for name, one in kept.items()},
    }


def main() -> None:
    """Measures the parts that are missing, prints the tables and writes the results."""
    options = parser().parse_args()
    where = Machine(options.device, tuple(options.flags.split()))
    # The servers of all parts inherit it.
    os.environ.update(where.environment)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    measure = measures(options, where, console)
    for name in options.parts:
        file = options.out / f"{name}.json"
        if not file.exists():
            start = time.perf_counter()
            part = measure[name]()
            seconds = time.perf_counter() - start
            file.write_text(json.dumps({"seconds": seconds, "part": part}, indent=1) + "\n")
            console.print(f"{name}: {seconds:.0f} s")
    found = results(options.out)
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "tables.md").write_text(markdown(found))
    console.print(Markdown(markdown(found)), width=WIDTH)


if __name__ == "__main__":
    main()
