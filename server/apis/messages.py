"""Earlier assistant turns in Anthropic's messages."""

from typing import Any

from models.manifest import Manifest
from server.apis.chat import CATEGORY_FIELD, check_content, opening_token


def annotate_messages(messages: list[Any], manifest: Manifest) -> tuple[list[Any], int]:
    """Puts the control token in front of every assistant turn's text.

    A turn is a refusal where it or one of its blocks has a ``refusal_category``: the server sends
    it in the text block of every refusal.

    Args:
        messages: As the client sent them; not changed.
        manifest: The served checkpoint's.

    Returns:
        The messages as vLLM is to read them, and how many tokens were put in.

    Raises:
        RequestError: ``refusal_category`` names no category of the checkpoint.
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
    # vLLM renders thinking and tool calls apart from the text, so the token goes before the text.
    for index, block in enumerate(blocks):
        if isinstance(block, dict) and block.get("type") == "text":
            text = block.get("text")
            if isinstance(text, str | None):
                opened = {**block, "text": token + (text or "")}
                return [*blocks[:index], opened, *blocks[index + 1 :]]
    return [{"type": "text", "text": token}, *blocks]
