"""Chat and completions: control tokens in earlier turns, and refusals in the choices."""

import reprlib
from typing import Any

from models.errors import RequestError
from models.manifest import Manifest
from server.apis.verdicts import Verdicts

CATEGORY_FIELD = "refusal_category"
# The field of a part's text, by the part's type.
# Source: vLLM 0.32, renderers/chat_utils.py, MM_PARSER_MAP.
_TEXT_KEYS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
# What vLLM's tool and reasoning parsers may have made of a refusal's text.
_UNPARSED: dict[str, Any] = {"tool_calls": [], "function_call": None, "reasoning": None}


def annotate(messages: list[Any], manifest: Manifest) -> tuple[list[Any], int]:
    """Inserts the control token in front of every assistant turn.

    A turn with a ``refusal`` or a ``refusal_category`` gets the token of that category (the server
    sends it with every refused message), by default the first category's.

    Args:
        messages: The client's; not changed.

    Returns:
        The messages for the chat template, and the number of inserted tokens.

    Raises:
        RequestError: The checkpoint has no such ``refusal_category``.
    """
    annotated = []
    count = 0
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "assistant":
            annotated.append(_annotate_turn(message, manifest, f"messages.{index}"))
            count += 1
        else:
            annotated.append(message)
    return annotated, count


def is_refusal(message: dict[str, Any]) -> bool:
    """Returns whether an assistant turn is a refusal, by OpenAI's fields or ours."""
    parts = message.get("content")
    return (
        bool(message.get("refusal"))
        or message.get(CATEGORY_FIELD) is not None
        or (
            isinstance(parts, list)
            and any(isinstance(p, dict) and p.get("type") == "refusal" for p in parts)
        )
    )


def check_content(content: Any, path: str) -> None:
    """Validates the type of a turn's content.

    Raises:
        RequestError: It is not a string, a list or null.
    """
    if not isinstance(content, str | list | None):
        raise RequestError(
            f"{path}.content: must be a string, a list of parts or null, got "
            f"{type(content).__name__}",
            param=f"{path}.content",
            status=400,
        )


def _annotate_turn(message: dict[str, Any], manifest: Manifest, path: str) -> dict[str, Any]:
    turn = {k: v for k, v in message.items() if k not in ("refusal", CATEGORY_FIELD)}
    token = opening_token(message.get(CATEGORY_FIELD), manifest, path, refused=is_refusal(message))
    refusal, content = message.get("refusal"), message.get("content")
    if refusal is not None and not isinstance(refusal, str):
        raise RequestError(
            f"{path}.refusal: must be a string or null, got {type(refusal).__name__}",
            param=f"{path}.refusal",
            status=400,
        )
    check_content(content, path)
    if not refusal and isinstance(content, list) and content:
        turn["content"] = _prefix_parts(content, token)
    else:
        turn["content"] = token + (refusal or (content if isinstance(content, str) else ""))
    return turn


def opening_token(category: Any, manifest: Manifest, path: str, *, refused: bool) -> str:
    """Returns the control token that opens an earlier turn.

    Args:
        category: The turn's ``refusal_category``, any JSON value.
        path: Of the turn in the body, for the error.
        refused: Whether the turn is a refusal, by default of the first category.

    Raises:
        RequestError: The checkpoint has no such category.
    """
    if category is None:
        return manifest.categories[0].token if refused else manifest.respond.token
    if not isinstance(category, str):
        raise RequestError(
            f"{path}.{CATEGORY_FIELD}: must be a string or null, got {type(category).__name__}",
            param=f"{path}.{CATEGORY_FIELD}",
        )
    for known in manifest.categories:
        if known.name == category:
            return known.token
    raise RequestError(
        f"{path}.{CATEGORY_FIELD}: this checkpoint has no category {reprlib.repr(category)}; "
        f"it has {', '.join(manifest.names)}",
        param=f"{path}.{CATEGORY_FIELD}",
    )


def _prefix_parts(parts: list[Any], token: str) -> list[Any]:
    for index, part in enumerate(parts):
        key = _text_key(part)
        if key is not None or isinstance(part, str):
            opened = token + part if key is None else {**part, key: token + part[key]}
            return [*parts[:index], opened, *parts[index + 1 :]]
    return [{"type": "text", "text": token}, *parts]


def _text_key(part: Any) -> str | None:
    # vLLM finds a part's text by the part's type, whatever other fields the part has.
    kind = part.get("type") if isinstance(part, dict) else None
    key = _TEXT_KEYS.get(kind) if isinstance(kind, str) else None
    return key if key is not None and isinstance(part.get(key), str) else None


class ChoicesShape:
    """Shapes each choice by its own decision.

    A refused chat message has its text in ``refusal``, on request in ``content`` too. A
    completion's choice is a text, and only its report says that it is a refusal.

    Args:
        echo: Whether the client asked for its own last message back.
    """

    def __init__(self, verdicts: Verdicts, *, echo: bool = False) -> None:
        self._verdicts = verdicts
        self._echo = echo
        self._reported: set[int] = set()
        self._categorised: set[int] = set()

    def answer(self, answer: dict[str, Any]) -> None:
        """Shapes a whole answer in place."""
        for choice in answer["choices"]:
            if "message" in choice:
                self._message(choice, choice["message"])
            self._report(choice)

    def event(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Shapes one chunk of a stream in place and returns it, alone in its list."""
        for choice in event["choices"]:
            if "delta" in choice:
                self._delta(choice, choice["delta"])
            self._report(choice)
        return [event]

    def _delta(self, choice: dict[str, Any], delta: dict[str, Any]) -> None:
        if delta.get("content") == "" and not self._verdicts.decided(choice["index"]):
            del delta["content"]  # the stream's first chunk, before the decision
        self._message(choice, delta)

    def _message(self, choice: dict[str, Any], message: dict[str, Any]) -> None:
        if self._echo and message.get("content"):
            message["content"] = self._verdicts.without_control_tokens(message["content"])
        index = choice["index"]
        category = self._verdicts.category(index)
        if category is None:
            return
        self._turn_into_refusal(choice, message)
        if index not in self._categorised:
            self._categorised.add(index)
            message[CATEGORY_FIELD] = category

    def _turn_into_refusal(self, choice: dict[str, Any], message: dict[str, Any]) -> None:
        text = message.get("content")
        opens_stream = "delta" in choice and "role" in message
        if not self._echo and not opens_stream:
            said = self._verdicts.take_text(choice["index"])
            text = text if said is None else said
        for name in _UNPARSED.keys() & message.keys():
            if "delta" in choice:
                del message[name]
            else:
                message[name] = _UNPARSED[name]
        if (logprobs := choice.get("logprobs")) and "content" in logprobs:
            content = logprobs["content"] if self._verdicts.in_content else None
            choice["logprobs"] = {**logprobs, "content": content, "refusal": logprobs["content"]}
        if choice.get("finish_reason") == "tool_calls":
            choice["finish_reason"] = "stop"
        if text is not None:
            message["refusal"] = text
            message["content"] = text if self._verdicts.in_content else None

    def _report(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        if index in self._reported:
            return
        report = self._verdicts.report(index)
        if report is not None:
            self._reported.add(index)
            choice["refusal_report"] = report
