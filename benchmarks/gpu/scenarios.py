"""The ways in which the engine is started, and their servers."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving.servers import STOCK
from server.policies.credentials import hash_key
from tests.e2e.servers import OPERATOR_KEY, Server

ADAPTER = "adapter"
RANK = 8
# Rounding moves margins and texts of 16 bits with the size of the batch.
PRECISE = ("--dtype", "float32")
DRAFTS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


@dataclass(frozen=True)
class Scenario:
    """One way to start the engine.

    Attributes:
        flags: vLLM's, beside those of all.
        model: The name that requests send.
        tolerance: What its margins may differ by from the reference's at least.
    """

    name: str
    flags: tuple[str, ...] = ()
    model: str = "demo"
    tolerance: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Where the engines run.

    Attributes:
        device: ``cuda``; ``cpu``, with the V1 runner; ``interpreted``, the V2 runner on a CPU.
        extra: Flags that the user adds for every engine.
    """

    device: str
    extra: tuple[str, ...] = ()

    @property
    def roomy(self) -> bool:
        """Whether all engines run at once."""
        return self.device == "cuda"

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags of every engine."""
        if self.device != "cuda":
            small = ("--max-model-len", "512", "--kv-cache-memory-bytes", "128M")
            return (*small, "--enforce-eager", *self.extra)
        # Several engines share the card: without a profile of its memory, none is in another's way.
        shared = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "2G")
        return ("--max-model-len", "512", *shared, *self.extra)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every server."""
        on_gpu = {"VLLM_USE_V2_MODEL_RUNNER": "1"} if self.device == "cuda" else {}
        operator = {"RHEOSTAT_OPERATOR_KEY_HASH": hash_key(OPERATOR_KEY)}
        # All requests are sent at once, also to an engine that takes 32.
        queue = {"RHEOSTAT_MAX_WAITING": "4096"}
        # Its log says which runner serves. TRL lowers the level where it is imported.
        logs = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}
        return {**on_gpu, **operator, **queue, **logs}


def scenarios(device: str, adapter: Path) -> list[Scenario]:
    """Returns the scenarios that a device has.

    Args:
        adapter: Folder of the LoRA adapter.
    """
    lora = ("--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"{ADAPTER}={adapter}")
    tiny = ("--block-size", "32", "--num-gpu-blocks-override", "24")
    tight = (*tiny[:-1], "17", "--no-enable-prefix-caching")
    if device == "cpu":  # the V1 runner: no chunks, no drafts
        return [Scenario("preemption, 24 blocks", tiny), Scenario("LoRA", lora, ADAPTER)]
    chunks = ("--enable-chunked-prefill", "--max-num-batched-tokens", "64", "--max-num-seqs", "32")
    any_v2 = [
        Scenario("chunked prefill, 64 tokens a step", chunks),
        Scenario("n-gram drafts", ("--speculative-config", json.dumps(DRAFTS))),
    ]
    if device == "interpreted":
        return [*any_v2, Scenario("preemption, 17 blocks", tight)]
    return [
        *any_v2,
        Scenario("graphs, async scheduling, prefix cache", ("--enable-prefix-caching",)),
        Scenario("preemption, 48 blocks", ("--num-gpu-blocks-override", "48")),
        # vLLM's kernels for adapters on a GPU take 16 bits only.
        Scenario("LoRA, float16", (*lora, "--dtype", "float16"), ADAPTER, 0.1),
        Scenario("eager", ("--enforce-eager",)),
    ]


def own_server(machine: Machine, model: Path, scenario: Scenario, log: Path) -> Server:
    """Starts this server."""
    arguments = ["serve", "--model", str(model), "--served-model-name", "demo"]
    flags = (*PRECISE, *machine.flags, *scenario.flags)
    module = "tests.e2e.interpreted_v2" if machine.device == "interpreted" else "rheostat"
    return Server(module, arguments, log, "/readyz", machine.environment, engine_flags=flags)


def stock_server(machine: Machine, model: Path, log: Path) -> Server:
    """Starts the unmodified engine."""
    arguments = ["--model", str(model), "--served-model-name", "demo"]
    flags = (*PRECISE, *machine.flags)
    return Server(STOCK, arguments, log, "/health", machine.environment, engine_flags=flags)


def save_adapter(model: Path, adapter: Path, merged: Path) -> None:
    """Writes a random LoRA adapter of a model's attention, and the model with it merged in.

    The unmodified engine serves the merged weights. With adapters switched on, vLLM 0.32 ended on a
    CPU when it was asked for the log-probabilities of a prompt.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # Not the usual start, which changes nothing.
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    adapted: Any = get_peft_model(base, config)
    adapted.save_pretrained(str(adapter))
    shutil.copytree(model, merged, ignore=shutil.ignore_patterns("*.safetensors", "demo_data"))
    adapted.merge_and_unload().save_pretrained(merged)
