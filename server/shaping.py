"""Turning vLLM's answer into one that says whether it is a refusal. Pure functions on JSON."""

from collections.abc import Sequence
from typing import Any

from models.manifest import Manifest
from server.context import Decision, Steering
from server.reports import build_report

MOST_IN_HEADERS = 64
CHAT = "chat.completion"
CHAT_CHUNK = "chat.completion.chunk"
PARSED_FIELDS = frozenset({"tool_calls", "function_call", "reasoning"})


class Shaper:
    """Shapes the answer of one request.

    Args:
        manifest: The served checkpoint's.
        steering: The request's, with the engine's decisions.
        echo: Whether the client asked for its own last message back.
        choices_per_prompt: The request's ``n``; vLLM numbers the choices of several prompts
            through.
    """

    def __init__(
        self, manifest: Manifest, steering: Steering, *, echo: bool, choices_per_prompt: int = 1
    ) -> None:
        self._manifest = manifest
        self._steering = steering
        self._echo = echo
        self._choices_per_prompt = choices_per_prompt
        self._reported: set[int] = set()
        self._categorised: set[int] = set()

    @property
    def needed(self) -> bool:
        """Whether any answer could differ from vLLM's own, as far as is known by now."""
        return (
            self._steering.report
            or self._echo
            or any(d.category is not None for d in self._steering.decisions.values())
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the decision headers, one value a choice.

        None when nothing was decided, or so many choices that proxies would refuse the headers.
        """
        decisions = [d for _, d in sorted(self._steering.decisions.items())]
        if not 0 < len(decisions) <= MOST_IN_HEADERS:
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
                delta = choice["delta"]
                if delta.get("content") == "" and self._decision(choice) is None:
                    del delta["content"]  # the stream's first chunk, before the decision
                self._shape_message(choice, delta)
        fresh = [c for c in chunk.get("choices", []) if c["index"] not in self._reported]
        self._report(fresh)
        return chunk

    def _shape_message(self, choice: dict[str, Any], message: dict[str, Any]) -> None:
        if self._echo and message.get("content"):
            message["content"] = self._without_control_tokens(message["content"])
        decision = self._decision(choice)
        if decision is None or decision.category is None:
            return
        self._turn_into_refusal(choice, message)
        if choice["index"] not in self._categorised:
            self._categorised.add(choice["index"])
            message["refusal_category"] = self._manifest.names[decision.category]

    def _turn_into_refusal(self, choice: dict[str, Any], message: dict[str, Any]) -> None:
        text = message.get("content")
        opens_stream = "delta" in choice and "role" in message
        if not self._echo and not opens_stream:
            # vLLM's tool and reasoning parsers may have read it as something else, or dropped it.
            text = self._steering.refusal_texts.pop(self._place(choice), text)
        for parsed in PARSED_FIELDS & message.keys():
            del message[parsed]
        if choice.get("finish_reason") == "tool_calls":
            choice["finish_reason"] = "stop"
        if text is not None:
            message["refusal"] = text
            message["content"] = None

    def _decision(self, choice: dict[str, Any]) -> Decision | None:
        return self._steering.decisions.get(self._place(choice))

    def _place(self, choice: dict[str, Any]) -> tuple[int, int]:
        if self._steering.beam_search:  # one decision for all beams
            return 0, 0
        index: int = choice["index"]
        return divmod(index, self._choices_per_prompt) if self._steering.calls > 1 else (0, index)

    def _report(self, choices: Sequence[dict[str, Any]]) -> None:
        if not self._steering.report:
            return
        for choice in choices:
            decision = self._decision(choice)
            if decision is None or decision.margins is None:
                continue
            self._reported.add(choice["index"])
            report = build_report(
                self._manifest.names,
                self._name(decision),
                decision.margins,
                self._steering.controls,
                self._steering.dials.forecast,
            )
            choice["refusal_report"] = report.to_json()

    def _name(self, decision: Decision) -> str | None:
        return None if decision.category is None else self._manifest.names[decision.category]

    def _without_control_tokens(self, text: str) -> str:
        for control in self._manifest.control_tokens:
            text = text.replace(control.token, "")
        return text
