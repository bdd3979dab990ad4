"""Anthropic's messages: control tokens in earlier turns, and refusals in answers.

A refusal is one text block, ``stop_reason`` and ``stop_details``.
"""

from collections.abc import Iterator
from typing import Any

from models.manifest import Manifest
from server.apis.chat import CATEGORY_FIELD, check_content, opening_token
from server.apis.verdicts import Verdicts

_TOLD = "message_delta"  # near the end of a stream, with the fields of the whole message


def annotate_messages(messages: list[Any], manifest: Manifest) -> tuple[list[Any], int]:
    """Inserts the control token in front of every assistant turn's text.

    A turn is a refusal if it or one of its blocks has a ``refusal_category``: the server sends it
    in the text block of every refusal.

    Args:
        messages: The client's; not changed.

    Returns:
        The messages for vLLM, and the number of inserted tokens.

    Raises:
        RequestError: The checkpoint has no such ``refusal_category``.
    """
    annotated = [
        _annotate_turn(message, manifest, f"messages.{index}") if _is_turn(message) else message
        for index, message in enumerate(messages)
    ]
    return annotated, sum(map(_is_turn, messages))


def _is_turn(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _annotate_turn(message: dict[str, Any], manifest: Manifest, path: str) -> dict[str, Any]:
    content = message.get("content")
    check_content(content, path)
    token = _opening_token(message, manifest, path)
    turn = {k: v for k, v in message.items() if k != CATEGORY_FIELD}
    if isinstance(content, list):
        turn["content"] = _prefix_text([_without_category(block) for block in content], token)
    else:
        turn["content"] = token + (content or "")
    return turn


def _opening_token(message: dict[str, Any], manifest: Manifest, path: str) -> str:
    blocks = message["content"] if isinstance(message.get("content"), list) else []
    places = [(path, message), *((f"{path}.content.{i}", b) for i, b in enumerate(blocks))]
    for place, node in places:
        if isinstance(node, dict) and node.get(CATEGORY_FIELD) is not None:
            return opening_token(node[CATEGORY_FIELD], manifest, place, refused=True)
    return manifest.respond.token


def _without_category(block: Any) -> Any:
    if not isinstance(block, dict):
        return block
    return {k: v for k, v in block.items() if k != CATEGORY_FIELD}


def _prefix_text(blocks: list[Any], token: str) -> list[Any]:
    # vLLM renders thinking and tool calls apart, so the token opens the text.
    for index, block in enumerate(blocks):
        if isinstance(block, dict) and block.get("type") == "text":
            text = block.get("text")
            if isinstance(text, str | None):
                opened = {**block, "text": token + (text or "")}
                return [*blocks[:index], opened, *blocks[index + 1 :]]
    return [{"type": "text", "text": token}, *blocks]


class MessageShape:
    """Shapes a message or the events of its stream.

    In the stream of a refusal, one text block replaces vLLM's content blocks: a tool or reasoning
    parser may have parsed the text as something else.
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
        """Yields what replaces one event of vLLM's."""
        category = self._verdicts.category()
        tells = event["type"] == _TOLD
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
    # In the block, because clients send back a message's content only.
    return {"type": "text", "text": text, CATEGORY_FIELD: category}


def _stop(message: dict[str, Any], category: str) -> None:
    message["stop_reason"] = "refusal"
    message["stop_details"] = {"type": "refusal", "category": category, "explanation": None}
