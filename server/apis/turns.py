"""Inserts control tokens into the earlier turns of a request's body."""

from dataclasses import dataclass
from typing import Any

from models.errors import RequestError
from models.manifest import Manifest
from server.apis.chat import annotate, is_refusal
from server.apis.messages import annotate_messages
from server.apis.responses import annotate_input, goes_on, is_refused_item
from server.web.bodies import flag

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
# Other routes drop ``messages``: no control token may come in by history that vLLM never reads.
READS_CHAT = frozenset({"/v1/chat/completions", "/v1/chat/completions/batch", "/invocations"})


@dataclass(frozen=True)
class Turns:
    """A request with control tokens in its earlier turns.

    Attributes:
        body: For vLLM; the client's own object if nothing changed.
        counts: Number of inserted control tokens of each prompt, in call order.
        continues: Whether the prompt ends inside an assistant turn that has its control token.
    """

    body: dict[str, Any]
    counts: tuple[int, ...] = ()
    continues: bool = False


def open_turns(body: dict[str, Any], path: str, manifest: Manifest) -> Turns:
    """Opens every earlier assistant turn with its control token.

    Args:
        body: The client's JSON object; not changed.
        path: Its route.

    Raises:
        RequestError: A turn's category or content is wrong, or a refusal is to be continued.
    """
    if path == RESPONSES:
        return _open_input(body, manifest)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return Turns(body)
    if path == MESSAGES:
        opened, count = annotate_messages(messages, manifest)
        return Turns({**body, "messages": opened} if count else body, (count,))
    return _open_chat(body, messages, path, manifest) if path in READS_CHAT else Turns(body)


def _open_input(body: dict[str, Any], manifest: Manifest) -> Turns:
    items = body.get("input")
    if not isinstance(items, list):
        return Turns(body)
    opened, count = annotate_input(items, manifest)
    continues = goes_on(opened)
    if continues and is_refused_item(items[-1]):
        raise RequestError(
            "an unfinished last message cannot be a refusal", param="input", status=400
        )
    return Turns({**body, "input": opened} if count else body, (count,), continues)


def _open_chat(body: dict[str, Any], messages: list[Any], path: str, manifest: Manifest) -> Turns:
    if path == "/invocations" and "prompt" in body:  # vLLM may read either
        raise RequestError("send either messages or a prompt", param="prompt", status=400)
    # A batch is a list of conversations.
    batch = all(isinstance(entry, list) for entry in messages)
    conversations = messages if batch else [messages]
    annotated = [annotate(conversation, manifest) for conversation in conversations]
    counts = tuple(count for _, count in annotated)
    continues = flag(body, "continue_final_message") and _ends_in_answers(conversations)
    if any(counts):
        opened = [turns for turns, _ in annotated]
        body = {**body, "messages": opened if batch else opened[0]}
    return Turns(body, counts, continues)


def _ends_in_answers(conversations: list[list[Any]]) -> bool:
    last = [conversation[-1] for conversation in conversations if conversation]
    answers = [m for m in last if isinstance(m, dict) and m.get("role") == "assistant"]
    if any(is_refusal(message) for message in answers):
        raise RequestError(
            "continue_final_message cannot continue a refusal",
            param="continue_final_message",
            status=400,
        )
    if answers and len(answers) < len(last):
        raise RequestError(
            "continue_final_message needs every conversation to end in an assistant turn",
            param="continue_final_message",
            status=400,
        )
    return bool(answers)
