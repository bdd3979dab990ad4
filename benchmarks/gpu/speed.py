"""The serving benchmark on a GPU: with the checkpoint itself, and with a large model's shape."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.scenarios import Machine
from benchmarks.serving.__main__ import parser, run

# Llama 3 8B's. No weights: vLLM draws them, and their values do not change a step's time.
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
# Of the same kind, to rehearse on a CPU.
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 4096}


def save_shape(checkpoint: Path, folder: Path, shape: dict[str, Any]) -> None:
    """Writes a checkpoint of another shape: template, tokenizer and manifest are the same."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("calibrations", "demo_data"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | shape))


def measure_speed(machine: Machine, checkpoint: Path, out: Path, *, large: bool) -> dict[str, Any]:
    """Runs the serving benchmark against stock vLLM; returns its results.

    Args:
        out: Folder of its tables and its figure.
        large: Whether the model has the large shape and drawn weights.
    """
    on_gpu = machine.device != "cpu"
    options = parser(
        checkpoint=checkpoint,
        groups=["cost", "grid"] if large else ["cost", "grid", "features"],
        starts=1,
        rounds=3 if on_gpu else 1,
        round_s=0.2 if on_gpu else 0.05,
        at_once=(1, 32, 128) if on_gpu else (1, 8),
        tokens=(1, 16, 128) if on_gpu and not large else (1, 16),
        out=out,
    ).parse_args([])
    flags = (*machine.flags, *(("--load-format", "dummy") if large else ()))
    with TemporaryDirectory() as folder:
        if large:
            options.checkpoint = Path(folder) / "large"
            save_shape(checkpoint, options.checkpoint, LARGE if on_gpu else SMALL)
            if on_gpu:
                flags += ("--gpu-memory-utilization", "0.35", "--kv-cache-memory-bytes", "8G")
        run(options, flags, together=on_gpu)
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return {**found, "tables": (out / "tables.md").read_text()}
