"""Sampling parameters: what a client may set, whether one pass is enough, and those of each pass.

Every function that returns parameters copies them; the client's are never changed.
"""

import copy
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.errors import RequestError
from server.context import DecisionContext
from server.generation.margins import Ticket

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

_WHOLE_VOCABULARY = 2**16
_CLIENT_IDS = ("logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids")
# What vLLM's V2 model runner has room for.
MOST_IDS = 1024
MOST_BAD_WORD_TOKENS = 1024
# Of 128, with those that end every answer.
MOST_STOPS = 100
_BITS_64 = range(-(2**63), 2**63)


class Logprobs(NamedTuple):
    """How many log-probabilities of a prompt and its answer are made into one answer.

    Each takes some microseconds of the event loop, all in one go.

    Attributes:
        prompt: Those of the prompt.
        each_step: Those of a step of all choices; 0 where the answer is streamed.
        each_piece: Those of all choices in one piece of a streamed answer.
    """

    prompt: int
    each_step: int
    each_piece: int


def logprobs_of(params: "SamplingParams", prompt_tokens: int, *, streamed: bool) -> Logprobs:
    """Counts the log-probabilities that are asked for; -1 is the whole vocabulary."""
    prompt, answer = params.prompt_logprobs, params.logprobs
    each_step = 0 if answer is None else params.n * _each_step(answer)
    return Logprobs(
        # Each choice makes those of its prompt anew.
        prompt=0 if prompt is None else params.n * prompt_tokens * _each_step(prompt),
        each_step=0 if streamed else each_step,
        each_piece=each_step * _steps_in_a_piece(params) if streamed else 0,
    )


def _steps_in_a_piece(params: "SamplingParams") -> int:
    interval = params.stream_interval or 1
    return interval if params.max_tokens is None else min(interval, params.max_tokens)


def _each_step(logprobs: int) -> int:
    return logprobs + 1 if logprobs >= 0 else _WHOLE_VOCABULARY


def check_params(params: "SamplingParams", control_ids: frozenset[int]) -> None:
    """Checks that the client's parameters name no control token.

    Raises:
        RequestError: A field names one.
    """
    for name in _CLIENT_IDS:
        value = getattr(params, name)
        if value and not control_ids.isdisjoint(value):
            raise RequestError(
                f"{name} names a control token of this model; use the `refusal` object to move "
                "its decisions",
                param=name,
                status=400,
            )


def check_room(
    params: "SamplingParams", encode: Callable[[str], list[int]], bad_word_tokens: int
) -> None:
    """Checks that vLLM's workers have room for the client's parameters.

    The V2 model runner would raise in its worker, which ends the engine. The bounds are those of
    both runners, so that a request does not depend on the hardware.

    Args:
        params: The client's.
        encode: Returns a text's token ids.
        bad_word_tokens: The workers' room for those of ``bad_words``.

    Raises:
        RequestError: A field holds too many entries, or a number of too many bits.
    """
    for name, ids, most in (
        ("allowed_token_ids", params.allowed_token_ids, MOST_IDS),
        ("logit_bias", params.logit_bias, MOST_IDS),
        ("stop_token_ids", params.min_tokens and params.stop_token_ids, MOST_STOPS),
    ):
        if ids and len(set(ids)) > most:
            with_field = " beside min_tokens" if name == "stop_token_ids" else ""
            raise RequestError(f"{name}: at most {most} tokens{with_field}", param=name)
    tokens = 0
    for word in params.bad_words or ():
        # vLLM forbids a word with and without a space before it.
        tokens += len(encode(word.lstrip())) + len(encode(f" {word.lstrip()}"))
        if tokens > bad_word_tokens:
            raise RequestError(
                f"bad_words: at most {bad_word_tokens} tokens, counted with and without a "
                "space before each word",
                param="bad_words",
            )
    for name, number in _numbers(params):
        if number is not None and number not in _BITS_64:
            raise RequestError(f"{name}: a number of at most 64 bits", param=name, status=400)


def _numbers(params: "SamplingParams") -> Iterator[tuple[str, int | None]]:
    # Those that vLLM does not bound. In JSON they may stand in strings.
    yield "top_k", params.top_k
    yield "stream_interval", params.stream_interval
    # Each choice adds its index.
    yield "seed", None if params.seed is None else params.seed + params.n - 1
    if (repeats := params.repetition_detection) is not None:
        for name in ("max_pattern_size", "min_pattern_size", "min_count"):
            yield f"repetition_detection.{name}", getattr(repeats, name)


def needs_decision_first(
    params: "SamplingParams", context: DecisionContext, *, fixed_texts: bool
) -> bool:
    """Whether the decision must be a pass of its own, before the answer's.

    It must where a parameter could change the control tokens' logits before our processor sees
    them, or show the control token in the text.
    """
    # The paper's rule reads all other logits too; tokens that end the request are masked while
    # min_tokens are not reached; the draws of a seed begin with the first token that the client
    # sees.
    reads_all = context.controls.rule is Rule.PAPER
    return bool(
        context.continues
        or params.structured_outputs is not None
        or params.allowed_token_ids
        or params.bad_words
        or params.repetition_penalty != 1.0
        or params.thinking_token_budget is not None
        or (params.seed is not None and params.temperature > 0)
        or not params.skip_special_tokens
        or (reads_all and (params.logit_bias or params.min_tokens))
        or (fixed_texts and params.min_tokens)
        or (context.has_floor and _shapes_text(params))
    )


def _shapes_text(params: "SamplingParams") -> bool:
    return bool(
        params.logit_bias
        or params.min_tokens
        or params.ignore_eos
        or params.presence_penalty
        or params.frequency_penalty
        or params.temperature > 1
    )


def steered(
    params: "SamplingParams", context: DecisionContext, ticket: Ticket | None
) -> "SamplingParams":
    """Returns the parameters of a pass that decides: those given, and the request's controls.

    Args:
        params: Of the pass.
        context: Holds the controls.
        ticket: Where the worker writes the margins, if they are wanted.
    """
    controls = context.controls
    deciding = copy.copy(params)
    deciding.skip_clone = True
    deciding._all_stop_token_ids = set(params._all_stop_token_ids)
    if controls.rule is Rule.SAMPLE and deciding.seed is None:
        # The worker draws from the seed, and vLLM gives each of n choices its own.
        deciding.seed = secrets.randbits(31)
    if not context.enforce:
        controls = Controls.never(len(controls.bias))
    wire = controls.to_wire()
    if ticket is not None:
        wire["ticket"] = ticket
    deciding.extra_args = {**(params.extra_args or {}), EXTRA_ARGS_KEY: wire}
    return deciding


def with_decision_step(
    params: "SamplingParams", ending: dict[int, str], longest: int
) -> "SamplingParams":
    """Lengthens a pass, in place, by the decision that is its first step.

    Args:
        params: Of the pass.
        ending: Refusal tokens that end the request, by id.
        longest: vLLM's longest sequence, in tokens.
    """
    if ending:
        params.stop_token_ids = [*(params.stop_token_ids or ()), *ending]
        params._all_stop_token_ids |= ending.keys()
    if params.max_tokens is not None:
        params.max_tokens = min(params.max_tokens, longest) + 1
    if params.min_tokens:
        params.min_tokens += 1
    return params


def after_decision(params: "SamplingParams") -> "SamplingParams":
    """Returns the parameters of a pass that goes on after a decision, without controls."""
    params = copy.copy(params)
    params.extra_args = _without_controls(params.extra_args)
    return params


def leave_to_model(params: "SamplingParams", repetition_penalty: float) -> None:
    """Removes, in place, what could make a compliant answer of a refusal's text.

    Args:
        params: Of the pass that writes the refusal.
        repetition_penalty: The checkpoint's own.
    """
    params.logit_bias = params.allowed_token_ids = params._bad_words_token_ids = None
    params.bad_words = []
    params.min_tokens, params.ignore_eos = 0, False
    params.presence_penalty = params.frequency_penalty = 0.0
    params.repetition_penalty = repetition_penalty
    params.temperature = min(params.temperature, 1.0)


def _without_controls(extra_args: dict[str, Any] | None) -> dict[str, Any] | None:
    return {k: v for k, v in (extra_args or {}).items() if k != EXTRA_ARGS_KEY} or None
