"""What a prompt and its sampling parameters may hold. They are vLLM's; this imports none of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from models.errors import RequestError
from models.manifest import Manifest
from server.hiding import Hider

_CLIENT_IDS = ("logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids")


def prompt_ids(prompt: Any) -> list[int]:
    """Returns the token ids of a rendered prompt.

    Raises:
        RequestError: It is of a kind whose ids are not known.
    """
    if not isinstance(prompt, dict) or prompt.get("type") not in ("token", "multimodal"):
        raise RequestError(
            "this server decides on token prompts only: send messages, text or token ids",
            status=400,
        )
    ids: list[int] = prompt["prompt_token_ids"]
    return ids


def with_ids(prompt: Any, ids: list[int]) -> Any:
    """Returns a rendered prompt with other ids."""
    changed = {**prompt, "prompt_token_ids": ids}
    changed.pop("prompt_token_offsets", None)
    return changed


def without_id(prompt: Any, token: int) -> Any:
    """Returns a rendered prompt without a token; the same object where it has none.

    Places of images and other media move with the text before them.
    """
    ids: Any = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    if not ids or token not in ids:
        return prompt
    kept = with_ids(prompt, [other for other in ids if other != token])
    places = kept.get("mm_placeholders")
    if places:
        kept["mm_placeholders"] = {
            kind: [
                replace(place, offset=place.offset - ids[: place.offset].count(token))
                for place in of_kind
            ]
            for kind, of_kind in places.items()
        }
    return kept


def check_opening(ids: Sequence[int], opening: Sequence[int]) -> None:
    """Holds a conversation's prompt to an end where the decision step begins.

    Raises:
        RequestError: It ends elsewhere.
    """
    if list(ids[-len(opening) :]) != list(opening):
        raise RequestError(
            "the prompt does not end where the assistant's turn begins, which is where this model "
            "decides: leave add_generation_prompt, truncation and chat_template_kwargs as they "
            "are, or send continue_final_message to go on with a turn",
            param="messages",
            status=400,
        )


def check_length(ids: Sequence[int], context: int) -> None:
    """Holds a prompt to a context of so many tokens.

    Raises:
        RequestError: There is no place for the decision and one token of the answer.
    """
    longest = context - 2
    if len(ids) > longest:
        raise RequestError(
            f"the prompt has {len(ids)} tokens and may have {longest}: the decision and the "
            "first token of the answer need a place each",
            param="messages",
            status=400,
        )


def check_control_tokens(ids: list[int], opening: list[int], allowed: int, hider: Hider) -> None:
    """Holds a prompt to the control tokens that the server itself put there.

    Args:
        ids: The prompt's.
        opening: What the chat template puts in front of every decision step.
        allowed: How many control tokens the server put in.
        hider: Knows the control tokens.

    Raises:
        RequestError: There are more, or one does not open a turn.
    """
    controls = hider.control_ids
    if controls.isdisjoint(ids):
        return
    places = [place for place, token in enumerate(ids) if token in controls]
    opened = all(ids[max(0, place - len(opening)) : place] == opening for place in places)
    if len(places) > allowed or not opened:
        raise RequestError(
            "the input holds text that is one of this model's control tokens; only the "
            "server sets these: remove it from the messages or the prompt",
            param="messages",
            status=400,
        )


def check_params(params: Any, control_ids: frozenset[int]) -> None:
    """Holds ``SamplingParams`` to ids that are no control tokens.

    Raises:
        RequestError: A field names one.
    """
    for name in _CLIENT_IDS:
        value = getattr(params, name)
        if value and not control_ids.isdisjoint(value):
            raise RequestError(
                f"{name} names a control token of this model; the `refusal` object is what moves "
                "its decisions",
                param=name,
                status=400,
            )


def before_last_turn(ids: list[int], manifest: Manifest) -> list[int]:
    """Returns what stands before the assistant turn that a prompt ends in.

    Raises:
        RequestError: That turn's control token was cut off.
    """
    respond = manifest.respond.id
    if respond not in ids:
        raise RequestError(
            "continue_final_message: the prompt does not reach back to the start of that message",
            param="messages",
            status=400,
        )
    return ids[: len(ids) - 1 - ids[::-1].index(respond)]
