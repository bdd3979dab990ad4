"""Shapes vLLM's answers, so that they say whether they are refusals.

Each API has a module of its own; this one finds the right module. All of them are pure functions
on JSON, with the state of a stream in one small object.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from server.apis.chat import ChoicesShape
from server.apis.messages import MessageShape
from server.apis.responses import ResponseShape
from server.apis.verdicts import Verdicts

MOST_IN_HEADERS = 64


class Shape(Protocol):
    """How one API says a decision."""

    def answer(self, answer: dict[str, Any]) -> None:
        """Shapes a whole answer in place."""

    def event(self, event: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """Returns what replaces one event of vLLM's: the event, others, or nothing."""


class Shaper:
    """Shapes the answer of one request.

    Args:
        echo: Whether the client asked for its own last message back.
    """

    def __init__(self, verdicts: Verdicts, *, echo: bool = False) -> None:
        self._verdicts = verdicts
        self._echo = echo
        self._shapes: dict[Callable[..., Shape], Shape] = {}

    @property
    def needed(self) -> bool:
        """Whether the answer can differ from vLLM's own, by the decisions so far."""
        return self._verdicts.reports or self._echo or self._verdicts.any_refusal

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Returns the decision headers, one value a choice.

        No headers if nothing was decided, or if proxies would reject the number of choices.
        """
        categories = self._verdicts.in_order()
        if not 0 < len(categories) <= MOST_IN_HEADERS:
            return []
        verdicts = ["respond" if category is None else "refuse" for category in categories]
        return [
            (b"x-refusal-decision", ", ".join(verdicts).encode()),
            (b"x-refusal-category", ", ".join(c or "none" for c in categories).encode()),
        ]

    def shape_answer(self, answer: Any) -> Any:
        """Shapes a whole answer in place and returns it; what is unknown passes unchanged.

        vLLM answers ``null`` to a client that has gone.
        """
        shape = self._shape_of(answer) if isinstance(answer, dict) else None
        if shape is not None:
            shape.answer(answer)
        return answer

    def shape_event(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns what replaces one event of a stream; unknown objects pass unchanged."""
        shape = self._shape_of(event)
        return [event] if shape is None else list(shape.event(event))

    def _shape_of(self, body: dict[str, Any]) -> Shape | None:
        kind = _kind(body)
        if kind is None:
            return None
        if kind not in self._shapes:
            echoes = {"echo": self._echo} if kind is ChoicesShape else {}
            self._shapes[kind] = kind(self._verdicts, **echoes)
        return self._shapes[kind]


def _kind(body: dict[str, Any]) -> Callable[..., Shape] | None:
    if "choices" in body:
        return ChoicesShape
    named = str(body.get("type", ""))
    if body.get("object") == "response" or named.startswith("response."):
        return ResponseShape
    if named.startswith(("message", "content_block_")):
        return MessageShape
    return None
