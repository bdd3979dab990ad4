"""Which prompts a request's body means: the test's own statement, route by route.

A control token opens every assistant turn, the chat template renders the rest, and the decision
comes after its generation prompt, or in front of the turn that is gone on with.
"""

from typing import Any, NamedTuple

from models.manifest import Manifest
from tests.e2e.decided.reference import Reference, Turn

Body = dict[str, Any]
CONTEXT = 512
# The demo's template raises on every other role; vLLM makes system turns of a developer's.
ROLES = ("system", "developer", "user", "assistant")
# Where a part of each type has its text.
TEXT_OF = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
    "tool_reference": "name",
}
OPENAI_KINDS = ("text", "refusal", "thinking", "tool_reference")
UNFINISHED = ("in_progress", "incomplete")


class UnreadableError(Exception):
    """The body means no prompt of this model's: whoever sends it has to get an error."""


def expected_prompts(
    path: str, body: Body, reference: Reference, *, prefill: bool
) -> list[list[int]]:
    """Returns the ids that each prompt of a request is decided after, in order.

    Args:
        path: The route.
        body: The client's.
        reference: Renders.
        prefill: Whether the policy lets a request begin the assistant's turn.

    Raises:
        UnreadableError: The request has to be an error.
    """
    try:
        return _prompts(path, body, reference, prefill)
    except (AttributeError, KeyError, TypeError) as error:
        raise UnreadableError(f"malformed: {error}") from error


def _prompts(path: str, body: Body, reference: Reference, prefill: bool) -> list[list[int]]:
    if path == "/v1/completions" or (path == "/invocations" and "prompt" in body):
        return [_raw(prompt, body, reference) for prompt in _raw_prompts(body["prompt"])]
    manifest = reference.manifest
    continues = bool(body.get("continue_final_message"))
    if path == "/v1/responses":
        conversations = [_response(body, manifest)]
        continues = _goes_on(body["input"])
        body = {"truncate_prompt_tokens": -1} if body.get("truncation") == "auto" else {}
    elif path == "/v1/messages":
        conversations = [_message(body, manifest)]
        continues, body = False, {}
    elif path == "/v1/chat/completions/batch":
        conversations = [_chat(_batched(messages), manifest) for messages in body["messages"]]
    else:
        conversations = [_chat(body["messages"], manifest)]
    if body.get("add_generation_prompt", not continues) is continues:
        raise UnreadableError("the prompt ends elsewhere than where the decision begins")
    if continues and not prefill:
        raise UnreadableError("the policy lets nobody begin the assistant's turn")
    return [_decided(_as_rendered(t), continues, body, reference) for t in conversations]


def _decided(turns: list[Turn], continues: bool, body: Body, reference: Reference) -> list[int]:
    if not turns or (continues and turns[-1].role != "assistant"):
        raise UnreadableError("there is no turn to decide about")
    ids = reference.conversation(turns, continues=continues)
    # Only the reference writes control tokens: the last one opens the turn that is gone on with.
    last = max((i for i, token in enumerate(ids) if token in reference.controls), default=0)
    decided = last if continues else len(ids)
    start, end = _kept(len(ids), body)
    if end <= decided and end < len(ids):
        raise UnreadableError("the decision is cut off")
    if not reference.controls.isdisjoint(ids[:start]) or start >= decided:
        raise UnreadableError("an assistant turn is cut off")
    return ids[start:decided]


def _as_rendered(turns: list[Turn]) -> list[Turn]:
    # Where there is a developer's turn, and no place for it but the system's, vLLM makes one
    # system turn of all of them, in front.
    system = [turn for turn in turns if turn.role in ("system", "developer")]
    if not any(turn.role == "developer" for turn in system):
        return turns
    if len(system) == 1 and turns[0] is system[0]:
        return [Turn("system", system[0].text), *turns[1:]]
    text = "\n\n".join(turn.text for turn in system if turn.text)
    return [Turn("system", text), *(turn for turn in turns if turn not in system)]


def _kept(length: int, body: Body) -> tuple[int, int]:
    """Returns from where to where a prompt of that length is kept."""
    longest = body.get("truncate_prompt_tokens")
    longest = CONTEXT - 1 if longest == -1 else longest
    if longest is None:
        return 0, length
    if not 0 < longest <= CONTEXT:
        raise UnreadableError("no such length")
    if body.get("truncation_side") == "right":
        return 0, min(longest, length)
    return max(0, length - longest), length


def _raw_prompts(prompt: Any) -> list[Any]:
    several = isinstance(prompt, list) and not all(isinstance(entry, int) for entry in prompt)
    return prompt if several else [prompt]


def _raw(prompt: Any, body: Body, reference: Reference) -> list[int]:
    ids = reference.raw(prompt) if isinstance(prompt, str) else list(prompt)
    start, end = _kept(len(ids), body)
    kept = ids[start:end]
    legal = all(token in reference.vocabulary for token in kept if isinstance(prompt, list))
    if not kept or not legal or not reference.controls.isdisjoint(kept):
        raise UnreadableError("no raw prompt")
    return kept


class Piece(NamedTuple):
    """One part of a turn's content.

    Attributes:
        text: What vLLM reads of it. It leaves out a part without any.
        opens: Whether an assistant's control token can stand in front of the text, in that part.
    """

    text: str | None
    opens: bool = True


def _turn(
    role: str, pieces: list[Piece], node: Body, manifest: Manifest, *, refused: bool = False
) -> Turn:
    """Returns a turn; an assistant's opens with the token of its category."""
    if role not in ROLES:
        raise UnreadableError(f"the template knows no {role}")
    if not all(isinstance(piece.text, str | None) for piece in pieces):
        raise UnreadableError("a text that is none")
    if role != "assistant":
        return Turn(role, _joined(pieces))
    token = _control_token(node.get("refusal_category"), manifest, refused=refused)
    return Turn(role, _behind_token(pieces), token)


def _joined(pieces: list[Piece]) -> str:
    return "\n".join(piece.text for piece in pieces if piece.text)


def _behind_token(pieces: list[Piece]) -> str:
    # Where no part can hold the control token, it is a part of its own.
    first = next((i for i, p in enumerate(pieces) if p.opens and p.text is not None), None)
    before, after = pieces[:first], pieces[0 if first is None else first + 1 :]
    if first is not None and _joined(before):
        raise UnreadableError("text in front of the control token")
    opened = (pieces[first].text or "") if first is not None else ""
    return "\n".join([opened, *(piece.text for piece in after if piece.text)])


def _control_token(category: Any, manifest: Manifest, *, refused: bool) -> str:
    if category is None:
        return manifest.categories[0].token if refused else manifest.respond.token
    for known in manifest.categories:
        if known.name == category:
            return known.token
    raise UnreadableError("no such category")


def _parts(content: Any) -> list[Any]:
    if content is None:
        return []
    return content if isinstance(content, list) else [content]


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else None


# --- chat ---


def _chat(messages: list[Body], manifest: Manifest) -> list[Turn]:
    return [_chat_turn(message, manifest) for message in messages]


def _chat_turn(message: Body, manifest: Manifest) -> Turn:
    role, content = message["role"], message.get("content")
    refused = any(_kind(part) == "refusal" for part in _parts(content))
    if role == "assistant" and message.get("refusal"):
        pieces, refused = [Piece(message["refusal"])], True
    elif isinstance(content, list):
        pieces = [_piece(part) for part in content]
    else:
        pieces = [Piece(content)]
    return _turn(role, pieces, message, manifest, refused=refused)


def _piece(part: Any) -> Piece:
    if isinstance(part, str):
        return Piece(part, opens=False)
    kind = part["type"]
    if part.get("uuid") is not None or kind not in TEXT_OF:
        raise UnreadableError("media")
    return Piece(part.get(TEXT_OF[kind]), opens=kind != "tool_reference")


def _batched(messages: list[Body]) -> list[Body]:
    # vLLM 0.32 validates a batch twice, and finds nothing the second time in a content that holds
    # no part of OpenAI's kinds.
    return [
        {**message, "content": None} if _reads_as_empty(message) else message
        for message in messages
    ]


def _reads_as_empty(message: Body) -> bool:
    parts = message.get("content")
    if message["role"] == "assistant" or not isinstance(parts, list):
        return False
    return not any(
        _kind(part) in OPENAI_KINDS and part.get(TEXT_OF[part["type"]]) is not None
        for part in parts
    )


# --- Responses: several items make one assistant turn ---


def _goes_on(items: Any) -> bool:
    last = items[-1] if isinstance(items, list) and items else {}
    if last.get("status") not in UNFINISHED:
        return False
    kind = last.get("type", "message")
    # vLLM drops the status of an assistant's message whose content is a string.
    answers = kind == "message" and last.get("role") == "assistant"
    return isinstance(last.get("content"), list) if answers else kind in ("message", "reasoning")


def _response(body: Body, manifest: Manifest) -> list[Turn]:
    instructions, items = body.get("instructions"), body["input"]
    turns = [Turn("system", instructions)] if instructions else []
    if isinstance(items, str):
        return [*turns, Turn("user", items)]
    holds: set[str] = set()  # what the assistant turn that is open holds
    for item in items:
        kind = _item_kind(item)
        if kind == "other":
            holds = set()
            turns.append(_said_item(item, manifest))
            continue
        if not holds or (kind != "call" and kind in holds):
            holds = set()
            turns.append(Turn("assistant", "", manifest.respond.token))
        holds.add(kind)
        if kind == "message":
            turns[-1] = _answer_item(item, manifest)
    return turns


def _item_kind(item: Body) -> str:
    kind = item.get("type", "message")
    if kind == "message" and item.get("role") == "assistant":
        return "message"
    if kind in ("function_call", "custom_tool_call"):
        return "call"
    return "reasoning" if kind == "reasoning" else "other"


def _answer_item(item: Body, manifest: Manifest) -> Turn:
    parts = _parts(item.get("content"))
    texts = [part if isinstance(part, str) else _answer_text(part) for part in parts]
    refused = any(_kind(part) == "refusal" for part in parts)
    return _turn("assistant", [Piece("\n".join(texts))], item, manifest, refused=refused)


def _answer_text(part: Body) -> str:
    text: str = part["refusal" if part["type"] == "refusal" else "text"]
    return text


def _said_item(item: Body, manifest: Manifest) -> Turn:
    if item.get("type", "message") != "message":
        raise UnreadableError("no message")
    return _chat_turn({"role": item["role"], "content": item.get("content")}, manifest)


# --- Anthropic's messages ---


def _message(body: Body, manifest: Manifest) -> list[Turn]:
    turns = _system_turn(body.get("system"))
    for message in body["messages"]:
        role, content = message["role"], message["content"]
        if role == "system":
            turns += _system_turn(content)
            continue
        blocks = _parts(content)
        pieces = [_block_piece(block, role) for block in blocks]
        if role == "user" and not _joined(pieces) and isinstance(content, list):
            continue
        nodes = [node for node in (message, *blocks) if isinstance(node, dict)]
        named = [node for node in nodes if node.get("refusal_category") is not None]
        turns.append(_turn(role, pieces, (named or nodes)[0], manifest))
    return turns


def _system_turn(content: Any) -> list[Turn]:
    blocks = [block for block in _parts(content) if _kind(block) in (None, "text")]
    text = "".join(_block_piece(block, "system").text or "" for block in blocks)
    return [Turn("system", text)] if text else []


def _block_piece(block: Any, role: str) -> Piece:
    if isinstance(block, str):
        return Piece(block)
    kind = block["type"]
    if kind == "tool_result" and role == "assistant":
        return Piece(f"Tool result: {block.get('content') or ''}", opens=False)
    if kind == "tool_result" or (kind == "image" and block.get("source")):
        raise UnreadableError("a tool's turn, or an image")
    return Piece(block.get("text") or "") if kind == "text" else Piece(None)
