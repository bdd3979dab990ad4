"""Turning vLLM's answer into one that says whether it is a refusal. Pure functions on JSON."""

from collections.abc import Sequence
from typing import Any

from models.manifest import Manifest
from server.context import Decision, Steering
from server.protocol import build_report

CHAT = "chat.completion"
CHAT_CHUNK = "chat.completion.chunk"


class Shaper:
    """Shapes the answer of one request.

    Args:
        manifest: The served checkpoint's.
        steering: The request's, with the engine's decisions.
        echo: Whether the client asked for its own last message back.
    """

    def __init__(self, manifest: Manifest, steering: Steering, *, echo: bool) -> None:
        self._manifest = manifest
        self._steering = steering
        self._echo = echo
        self._reported: set[int] = set()

    @property
    def needed(self) -> bool:
        """Whether any answer could differ from vLLM's own, as far as is known by now."""
        return (
            self._steering.report
            or self._echo
            or any(d.category is not None for d in self._steering.decisions.values())
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the decision headers, one value a choice; none when nothing was decided."""
        decisions = [d for _, d in sorted(self._steering.decisions.items())]
        if not decisions:
            return []
        verdicts = ["respond" if d.category is None else "refuse" for d in decisions]
        names = [self._name(d) or "none" for d in decisions]
        return [
            (b"x-refusal-decision", ", ".join(verdicts).encode()),
            (b"x-refusal-category", ", ".join(names).encode()),
        ]

    def shape_answer(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Shapes a whole answer in place and returns it."""
        if answer.get("object") == CHAT:
            for choice in answer["choices"]:
                self._shape_message(choice, choice["message"])
        self._report(answer.get("choices", []))
        return answer

    def shape_chunk(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Shapes one event of a stream in place and returns it."""
        if chunk.get("object") == CHAT_CHUNK:
            for choice in chunk["choices"]:
                self._shape_message(choice, choice["delta"])
        fresh = [c for c in chunk.get("choices", []) if c["index"] not in self._reported]
        self._report(fresh)
        return chunk

    def _shape_message(self, choice: dict[str, Any], message: dict[str, Any]) -> None:
        if self._echo and message.get("content"):
            message["content"] = self._without_control_tokens(message["content"])
        decision = self._steering.decisions.get((0, choice["index"]))
        if decision is None:
            if message.get("content") == "":
                del message["content"]  # a stream's first chunk, before this choice was decided
        elif decision.category is not None:
            self._turn_into_refusal(message, self._manifest.names[decision.category])

    def _turn_into_refusal(self, message: dict[str, Any], category: str) -> None:
        if "content" in message:
            message["refusal"] = message["content"]
            message["content"] = None
        if "role" in message:
            message["refusal_category"] = category

    def _report(self, choices: Sequence[dict[str, Any]]) -> None:
        if not self._steering.report:
            return
        for choice in choices:
            decision = self._steering.decisions.get((0, choice["index"]))
            if decision is None or decision.margins is None:
                continue
            self._reported.add(choice["index"])
            report = build_report(
                self._manifest.names,
                self._name(decision),
                decision.margins,
                self._steering.controls,
            )
            choice["refusal_report"] = report.model_dump()

    def _name(self, decision: Decision) -> str | None:
        return None if decision.category is None else self._manifest.names[decision.category]

    def _without_control_tokens(self, text: str) -> str:
        for control in self._manifest.control_tokens:
            text = text.replace(control.token, "")
        return text
