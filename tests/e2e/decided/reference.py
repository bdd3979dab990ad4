"""What the model itself thinks of a conversation, without the server: transformers, on the CPU."""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.manifest import Manifest, load_manifest

# Stands for the mark that the server breaks special tokens with. It counts while a prompt is cut.
MARK = -1
_MARK = "\ue000"


class Turn(NamedTuple):
    """One turn of a rendered conversation.

    Attributes:
        role: As the chat template knows it.
        text: What the client wrote. Nothing in it is a special token.
        control: The control token that opens an assistant's turn.
    """

    role: str
    text: str
    control: str = ""


class Reference:
    """Renders conversations and knows their margins.

    Args:
        checkpoint: The folder that is served.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.manifest: Manifest = load_manifest(checkpoint)
        self.controls = frozenset(self.manifest.control_ids)
        self.vocabulary = range(json.loads((checkpoint / "config.json").read_text())["vocab_size"])
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = model.eval()
        self._margins: dict[tuple[int, ...], tuple[float, ...]] = {}
        added = json.loads((checkpoint / "tokenizer.json").read_text())["added_tokens"]
        controls = [token.token for token in self.manifest.control_tokens]
        self._special = _spelling(controls + [token["content"] for token in added])
        self._control = _spelling(controls)

    def conversation(self, turns: list[Turn], *, continues: bool = False) -> list[int]:
        """Returns the ids of a conversation.

        They end where the next assistant turn is decided, or inside the last one where the model
        goes on with it.
        """
        messages = [
            {"role": turn.role, "content": turn.control + _broken(turn.text, self._special)}
            for turn in turns
        ]
        return self._encoded(
            self._tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=not continues,
                continue_final_message=continues,
            )
        )

    def raw(self, prompt: str) -> list[int]:
        """Returns the ids of a raw prompt, whose writer may set turn markers of its own."""
        return self._encoded(_broken(prompt, self._control))

    def margins(self, ids: list[int]) -> tuple[float, ...]:
        """Returns each category's log-odds against responding, after these ids."""
        key = tuple(token for token in ids if token != MARK)
        if key not in self._margins:
            with torch.inference_mode():
                logits = self._model(torch.tensor([key])).logits[0, -1]
            respond = logits[self.manifest.respond.id]
            self._margins[key] = tuple(
                float(logits[category.id] - respond) for category in self.manifest.categories
            )
        return self._margins[key]

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, piece in enumerate(text.split(_MARK)):
            ids += [MARK] if place else []
            ids += self._tokenizer.encode(piece, add_special_tokens=False)
        return ids


def log_odds(sensitivity: float) -> float:
    """Returns the bias of a sensitivity."""
    return math.log(sensitivity / (1 - sensitivity))


def _spelling(tokens: list[str]) -> "re.Pattern[str]":
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _broken(text: str, special: "re.Pattern[str]") -> str:
    return special.sub(lambda found: found[0][0] + _MARK + found[0][1:], text)
