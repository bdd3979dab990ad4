"""The Responses API: control tokens in earlier turns, and refusals in answers.

A refusal is one message with one ``refusal`` part, and events of its own.

vLLM merges several items into one chat turn: a message, its reasoning and its tool calls. This
module follows vLLM's rules, so that each of those turns opens with exactly one control token.
Source: vLLM 0.32, entrypoints/openai/responses/utils.py, _construct_message_from_response_item.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from models.errors import RequestError
from models.manifest import Manifest
from server.apis.chat import CATEGORY_FIELD, check_content, opening_token
from server.apis.verdicts import Verdicts

Kind = Literal["message", "reasoning", "call", "other"]
_CALLS = frozenset({"function_call", "custom_tool_call"})
_UNFINISHED = frozenset({"in_progress", "incomplete"})
_COMPLETED = "response.completed"
# Events that come before the decision.
_BEFORE_DECISION = frozenset({"response.created", "response.in_progress"})


@dataclass
class _Turn:
    """The items that vLLM merges into one turn; other roles' items are not merged."""

    items: list[dict[str, Any]]
    kinds: set[Kind] = field(default_factory=set)

    def takes(self, kind: Kind) -> bool:
        """Returns whether vLLM merges an item into this turn."""
        if kind == "other" or "other" in self.kinds:
            return False
        return kind == "call" or kind not in self.kinds


def annotate_input(items: list[Any], manifest: Manifest) -> tuple[list[Any], int]:
    """Inserts the control token in front of every assistant turn's text.

    A message with a ``refusal`` part or a ``refusal_category`` gets the token of that category, by
    default the first category's.

    Args:
        items: The client's; not changed.

    Returns:
        The items for vLLM, and the number of inserted tokens.

    Raises:
        RequestError: The checkpoint has no such ``refusal_category``, or a part of an assistant
            message is neither text nor a refusal.
    """
    turns: list[_Turn] = []
    for index, item in enumerate(items):
        kind = _kind(item)
        if kind == "message":
            item = _annotate_message(item, manifest, f"input.{index}")
        if not (turns and turns[-1].takes(kind)):
            turns.append(_Turn([]))
        turns[-1].items.append(item)
        turns[-1].kinds.add(kind)
    count = 0
    annotated: list[Any] = []
    for turn in turns:
        if "other" not in turn.kinds:
            count += 1
            if "message" not in turn.kinds:
                annotated.append(_message(manifest.respond.token))
        annotated.extend(turn.items)
    return annotated, count


def goes_on(items: list[Any]) -> bool:
    """Returns whether annotated input ends in an assistant turn that vLLM continues."""
    if not items or _kind(items[-1]) not in ("message", "reasoning"):
        return False
    status = items[-1].get("status")
    return isinstance(status, str) and status in _UNFINISHED


def is_refused_item(item: Any) -> bool:
    """Returns whether an item of the client's is a refusal."""
    if _kind(item) != "message":
        return False
    parts = item.get("content")
    return item.get(CATEGORY_FIELD) is not None or (
        isinstance(parts, list)
        and any(isinstance(part, dict) and part.get("type") == "refusal" for part in parts)
    )


def _kind(item: Any) -> Kind:
    if not isinstance(item, dict):
        return "other"
    named = item.get("type", "message")
    if named == "message" and item.get("role") == "assistant":
        return "message"
    if named == "reasoning":
        return "reasoning"
    return "call" if isinstance(named, str) and named in _CALLS else "other"


def _annotate_message(item: dict[str, Any], manifest: Manifest, path: str) -> dict[str, Any]:
    content = item.get("content")
    check_content(content, path)
    category = item.get(CATEGORY_FIELD)
    token = opening_token(category, manifest, path, refused=is_refused_item(item))
    kept = {k: v for k, v in item.items() if k != CATEGORY_FIELD and v is not None}
    if not isinstance(content, list):
        kept.pop("status", None)  # vLLM continues only messages of parts
        return {**kept, **_message(token + (content or ""))}
    texts = [_text(part, f"{path}.content.{index}") for index, part in enumerate(content)]
    # vLLM reads only the first part, and no refusal.
    return {**kept, **_message(token + "\n".join(texts))}


def _text(part: Any, path: str) -> str:
    if isinstance(part, dict):
        name = "refusal" if part.get("type") == "refusal" else "text"
        if isinstance(part.get(name), str):
            text: str = part[name]
            return text
    raise RequestError(
        f"{path}: an assistant message holds output_text and refusal parts, each with its text",
        param=path,
        status=400,
    )


def _message(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "role": "assistant", "content": [part]}


class ResponseShape:
    """Shapes a response or the events of its stream.

    In the stream of a refusal, our events replace vLLM's events of output items, numbered without a
    gap: a tool or reasoning parser may have parsed the text as something else.
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
        """Yields what replaces one event of vLLM's."""
        category = self._verdicts.category()
        if category is not None and event["type"] not in _BEFORE_DECISION:
            yield from self._instead(event, category)
        if event["type"] == _COMPLETED:
            self.answer(event["response"])
        if category is None or event["type"] in (_COMPLETED, *_BEFORE_DECISION):
            yield self._numbered(event)

    def _instead(self, event: dict[str, Any], category: str) -> Iterator[dict[str, Any]]:
        if self._number is None:
            self._number = event["sequence_number"]
            yield from map(self._numbered, self._opening(category))
        if text := self._verdicts.take_text():
            self._said += text
            yield self._numbered(self._of_part("response.refusal.delta", delta=text))
        if event["type"] == _COMPLETED:
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
