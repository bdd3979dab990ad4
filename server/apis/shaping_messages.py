"""Anthropic's messages: a refusal is one text block, ``stop_reason`` and ``stop_details``."""

from collections.abc import Iterator
from typing import Any

from server.apis.chat import CATEGORY_FIELD
from server.apis.verdicts import Verdicts

TOLD = "message_delta"  # ends a stream, with what is known of the whole message


class MessageShape:
    """Shapes a message or the events of its stream.

    In the stream of a refusal, vLLM's content blocks are left out: a tool or reasoning parser may
    have made anything of the text. One text block stands in their place.

    Args:
        verdicts: What was decided.
    """

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts
        self._opened = False

    def answer(self, answer: dict[str, Any]) -> None:
        """Shapes a whole message in place."""
        if (category := self._verdicts.category()) is not None:
            answer["content"] = [_block(category, self._verdicts.take_text() or "")]
            _stop(answer, category)
            answer.pop("stop_sequence", None)
        self._report(answer)

    def event(self, event: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields what stands for one event of vLLM's."""
        category = self._verdicts.category()
        tells = event["type"] == TOLD
        if category is not None and (tells or event["type"].startswith("content_block_")):
            yield from self._instead(category, ends=tells)
            if not tells:
                return
            _stop(event["delta"], category)
            event["delta"]["stop_sequence"] = None
        if tells:
            self._report(event["delta"])
        yield event

    def _instead(self, category: str, *, ends: bool) -> Iterator[dict[str, Any]]:
        if not self._opened:
            self._opened = True
            block = _block(category, "")
            yield {"type": "content_block_start", "index": 0, "content_block": block}
        if text := self._verdicts.take_text():
            delta = {"type": "text_delta", "text": text}
            yield {"type": "content_block_delta", "index": 0, "delta": delta}
        if ends:
            yield {"type": "content_block_stop", "index": 0}

    def _report(self, message: dict[str, Any]) -> None:
        if (report := self._verdicts.report()) is not None:
            message["refusal_report"] = report


def _block(category: str, text: str) -> dict[str, Any]:
    # In the block, because clients send a message's content back, and not the message.
    return {"type": "text", "text": text, CATEGORY_FIELD: category}


def _stop(message: dict[str, Any], category: str) -> None:
    message["stop_reason"] = "refusal"
    message["stop_details"] = {"type": "refusal", "category": category, "explanation": None}
