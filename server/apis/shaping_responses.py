"""The Responses API: a refusal is one message with one ``refusal`` part, and events of its own."""

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

from server.apis.chat import CATEGORY_FIELD
from server.apis.verdicts import Verdicts

COMPLETED = "response.completed"
# They come before the decision.
OPENING = frozenset({"response.created", "response.in_progress"})


class ResponseShape:
    """Shapes a response or the events of its stream.

    In the stream of a refusal, vLLM's events of output items are left out: a tool or reasoning
    parser may have made anything of the text. Ours stand in their place, numbered on without a gap.

    Args:
        verdicts: What was decided.
    """

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._item_id = f"msg_{uuid4().hex}"
        self._said = ""
        self._number: int | None = None

    def answer(self, answer: dict[str, Any]) -> None:
        """Shapes a whole response in place."""
        if (category := self._verdicts.category()) is not None:
            self._said += self._verdicts.take_text() or ""
            answer["output"] = [self._item(category, "completed", [_part(self._said)])]
        if (report := self._verdicts.report()) is not None:
            answer["refusal_report"] = report

    def event(self, event: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields what stands for one event of vLLM's."""
        category = self._verdicts.category()
        if category is not None and event["type"] not in OPENING:
            yield from self._instead(event, category)
        if event["type"] == COMPLETED:
            self.answer(event["response"])
        if category is None or event["type"] in (COMPLETED, *OPENING):
            yield self._numbered(event)

    def _instead(self, event: dict[str, Any], category: str) -> Iterator[dict[str, Any]]:
        if self._number is None:
            self._number = event["sequence_number"]
            yield from map(self._numbered, self._opening(category))
        if text := self._verdicts.take_text():
            self._said += text
            yield self._numbered(self._of_part("response.refusal.delta", delta=text))
        if event["type"] == COMPLETED:
            yield from map(self._numbered, self._closing(category))

    def _opening(self, category: str) -> Iterator[dict[str, Any]]:
        item = self._item(category, "in_progress", [])
        yield {"type": "response.output_item.added", "output_index": 0, "item": item}
        yield self._of_part("response.content_part.added", part=_part(""))

    def _closing(self, category: str) -> Iterator[dict[str, Any]]:
        part = _part(self._said)
        item = self._item(category, "completed", [part])
        yield self._of_part("response.refusal.done", refusal=self._said)
        yield self._of_part("response.content_part.done", part=part)
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}

    def _of_part(self, kind: str, **fields: Any) -> dict[str, Any]:
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        return {"type": kind, **place, **fields}

    def _item(self, category: str, status: str, content: list[Any]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "content": content,
            "role": "assistant",
            "status": status,
            "type": "message",
            "phase": None,
            CATEGORY_FIELD: category,
        }

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        if self._number is not None:
            event["sequence_number"] = self._number
            self._number += 1
        return event


def _part(text: str) -> dict[str, str]:
    return {"type": "refusal", "refusal": text}
