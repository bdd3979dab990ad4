"""The procedure of the paper's scripts, with transformers: two calls of the model a batch.

A forward pass gives the control tokens' probabilities, a threshold chooses one, and the answer is
generated from prompt and token.
Source: the released scripts of arXiv 2412.06748.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.manifest import load_manifest

THRESHOLD = 0.5


class PaperProcedure:
    """A checkpoint, answered by transformers.

    Args:
        device: Where the model runs, as torch names it.
    """

    def __init__(self, checkpoint: Path, device: str = "cpu") -> None:
        manifest = load_manifest(checkpoint)
        self._refusals = torch.tensor(manifest.control_ids[:-1], device=device)
        self._respond = manifest.control_ids[-1]
        self._device = device
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
        self._model = model.to(device).eval()

    def per_s(self, prompts: list[str], tokens: int) -> float:
        """Returns the prompts a second of one batch."""
        start = time.perf_counter()
        self.answers(prompts, tokens)
        return len(prompts) / (time.perf_counter() - start)

    @torch.inference_mode()
    def answers(self, prompts: list[str], tokens: int) -> torch.Tensor:
        """Returns ``[prompts, tokens]`` ids, without the control tokens."""
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        batch = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(self._device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        control = self._chosen(self._model(input_ids=ids, attention_mask=mask).logits[:, -1])
        ids = torch.cat((ids, control.unsqueeze(1)), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        out: torch.Tensor = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
        )
        return out[:, ids.shape[1] :]

    def _chosen(self, logits: torch.Tensor) -> torch.Tensor:
        shares, first = logits.float().softmax(-1)[:, self._refusals].max(dim=-1)
        return torch.where(shares >= THRESHOLD, self._refusals[first], self._respond)
