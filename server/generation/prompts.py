"""What a rendered prompt may hold, and where in it the decision stands."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from models.errors import ContextLengthError, RequestError

if TYPE_CHECKING:
    from vllm.inputs import MultiModalInput, TokensInput

TokenPrompt: TypeAlias = "TokensInput | MultiModalInput"


def token_prompt(prompt: object) -> TokenPrompt:
    """Returns a rendered prompt, once it is known to have token ids.

    Raises:
        RequestError: Its kind has none.
    """
    if not isinstance(prompt, dict) or prompt.get("type") not in ("token", "multimodal"):
        raise RequestError(
            "this server decides on token prompts only: send messages, text or token ids",
            status=400,
        )
    return cast("TokenPrompt", prompt)


def with_ids(prompt: TokenPrompt, ids: list[int]) -> TokenPrompt:
    """Returns a copy of a prompt with other ids."""
    changed: Any = {**prompt, "prompt_token_ids": ids}
    changed.pop("prompt_token_offsets", None)
    return cast("TokenPrompt", changed)


def without_tokens(prompt: TokenPrompt, tokens: Collection[int]) -> TokenPrompt:
    """Returns a prompt without some tokens; the same object where it has none of them.

    Places of images and other media move with the text before them.
    """
    ids = prompt["prompt_token_ids"]
    if not any(token in ids for token in tokens):
        return prompt
    kept: Any = with_ids(prompt, [other for other in ids if other not in tokens])
    places = kept.get("mm_placeholders")
    if places:
        kept["mm_placeholders"] = {
            kind: [
                replace(place, offset=place.offset - sum(map(ids[: place.offset].count, tokens)))
                for place in of_kind
            ]
            for kind, of_kind in places.items()
        }
    return cast("TokenPrompt", kept)


def check_length(ids: Sequence[int], context: int) -> None:
    """Validates a prompt's length.

    Args:
        ids: The prompt's.
        context: The model's longest sequence, in tokens.

    Raises:
        ContextLengthError: No place is left for the decision and one token of the answer.
    """
    longest = context - 2
    if len(ids) > longest:
        raise ContextLengthError(
            f"the prompt has {len(ids)} tokens and may have {longest}: the decision and the "
            "first token of the answer take one place each",
            param="messages",
        )


def decision_step(
    ids: list[int],
    opening: list[int],
    controls: frozenset[int],
    *,
    written: int,
    opens_turn: bool,
    continues: bool,
) -> int:
    """Returns how many of a prompt's ids the decision may see.

    The server wrote one control token in front of each earlier assistant turn. A prompt that does
    not hold exactly these, each behind the chat template's opening, is rejected: whatever drops,
    repeats or cuts off a turn could otherwise move the decision to another turn.

    Args:
        ids: The rendered prompt's.
        opening: Ids that the chat template puts in front of every decision step.
        controls: Ids of the control tokens.
        written: How many control tokens the server wrote into the conversation.
        opens_turn: Whether the prompt is a conversation, which ends with the opening.
        continues: Whether it ends inside the last assistant turn instead.

    Raises:
        RequestError: The prompt holds other control tokens than the server wrote, or ends
            elsewhere.
    """
    places = [] if controls.isdisjoint(ids) else [i for i, t in enumerate(ids) if t in controls]
    if len(places) > written or not all(_ends_with(ids, opening, place) for place in places):
        raise _wrong_prompt(
            "the input holds text that is one of this model's control tokens; only the "
            "server sets these: remove it from the messages or the prompt"
        )
    if len(places) < written:
        raise _wrong_prompt(
            f"the prompt holds {len(places)} of the conversation's {written} assistant turns: "
            "send each as text, and leave truncate_prompt_tokens and truncation out, which cut "
            "turns off"
        )
    if opens_turn and _ends_with(ids, opening, len(ids)) is continues:
        raise _wrong_prompt(
            "the prompt does not end where the assistant's turn begins, which is where this model "
            "decides: leave add_generation_prompt, truncation and chat_template_kwargs as they "
            "are, or send continue_final_message to go on with a turn"
        )
    return places[-1] if continues else len(ids)


def _ends_with(ids: list[int], opening: list[int], end: int) -> bool:
    return ids[max(0, end - len(opening)) : end] == opening


def _wrong_prompt(message: str) -> RequestError:
    return RequestError(message, param="messages", status=400)
