"""What a user would write first: a bias for each request, in Python.

Loaded into vLLM by `--logits-processors`; V1 model runner.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from models.manifest import load_manifest


class NaiveBias(AdapterLogitsProcessor):
    """Adds a request's biases at its first step; ``vllm_xargs`` holds them by category."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__(vllm_config, device, is_pin_memory)
        self._categories = load_manifest(Path(vllm_config.model_config.model)).categories

    def is_argmax_invariant(self) -> bool:
        """A bias may change the largest logit."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor]:
        """Returns what one request does to its row."""
        asked = params.extra_args or {}
        biases = [(c.id, float(asked[c.name])) for c in self._categories if c.name in asked]

        def add(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            if not output_ids:
                for token, bias in biases:
                    logits[token] += bias
            return logits

        return add
