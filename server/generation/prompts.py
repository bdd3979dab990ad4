"""What a prompt and its sampling parameters may hold. They are vLLM's; this imports none of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from models.errors import ContextLengthError, RequestError

_WHOLE_VOCABULARY = 2**16
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


def check_length(ids: Sequence[int], context: int) -> None:
    """Holds a prompt to a context of so many tokens.

    Raises:
        RequestError: There is no place for the decision and one token of the answer.
    """
    longest = context - 2
    if len(ids) > longest:
        raise ContextLengthError(
            f"the prompt has {len(ids)} tokens and may have {longest}: the decision and the "
            "first token of the answer need a place each",
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
    """Returns where a prompt is decided: how many of its ids the decision may see.

    The server wrote one control token in front of each earlier assistant turn. The prompt holds
    exactly these, each behind the chat template's opening, or it is rejected: whatever drops,
    repeats or cuts off a turn could otherwise move the decision to another turn.

    Args:
        ids: The rendered prompt's.
        opening: What the chat template puts in front of every decision step.
        controls: Ids of the control tokens.
        written: How many control tokens the server wrote into the conversation.
        opens_turn: Whether the prompt is a conversation, which ends with the opening.
        continues: Whether it ends inside the last assistant turn instead.

    Raises:
        RequestError: The control tokens are others than the server wrote, or the prompt ends
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


class Logprobs(NamedTuple):
    """How many log-probabilities of a prompt and its answer are made into one answer.

    Each takes some microseconds of the event loop, all in one go.

    Attributes:
        prompt: Those of the prompt.
        each_step: Those of a step of all choices; none where the answer is sent piece by piece.
        each_piece: Those of all choices in one piece of an answer that is.
    """

    prompt: int
    each_step: int
    each_piece: int


def logprobs_of(params: Any, prompt_tokens: int, *, streamed: bool) -> Logprobs:
    """Counts what ``SamplingParams`` ask for; -1 is the whole vocabulary."""
    prompt, answer = params.prompt_logprobs, params.logprobs
    each_step = 0 if answer is None else params.n * _each_step(answer)
    return Logprobs(
        # Each choice makes those of its prompt anew.
        prompt=0 if prompt is None else params.n * prompt_tokens * _each_step(prompt),
        each_step=0 if streamed else each_step,
        each_piece=each_step * _steps_in_a_piece(params) if streamed else 0,
    )


def _steps_in_a_piece(params: Any) -> int:
    interval = params.stream_interval or 1
    return interval if params.max_tokens is None else min(interval, params.max_tokens)


def _each_step(logprobs: int) -> int:
    return logprobs + 1 if logprobs >= 0 else _WHOLE_VOCABULARY


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
