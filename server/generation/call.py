"""One call of ``generate()``: the prompt is checked and decided, and the decision is hidden."""

from contextlib import aclosing
from typing import TYPE_CHECKING

from models.errors import RequestError
from server.context import Decision, DecisionContext
from server.generation.deciding import Decider
from server.generation.grammars import check_dictation, check_grammar
from server.generation.parameters import check_params, check_room, logprobs_of
from server.generation.passes import passes
from server.generation.prompts import (
    TokenPrompt,
    check_length,
    decision_step,
    token_prompt,
    without_tokens,
)
from server.generation.seam import Call, CheckedPrompt, Engine, Outputs
from server.settings import Settings
from server.web.errors import failure_of

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams


def admit(
    engine: Engine,
    context: DecisionContext,
    params: "SamplingParams",
    settings: Settings,
    *,
    adapted: bool,
) -> None:
    """Checks what can be checked before there is a call, and fits the dials to an adapter.

    Args:
        engine: Knows whether ``logprob_token_ids`` are safe, and counts tokens.
        context: Of the HTTP request; an adapter changes its dials.
        params: The client's.
        settings: Hold the bounds of grammars.
        adapted: Whether the call names an adapter.

    Raises:
        RequestError: An adapter is asked for a rate, the grammar is not allowed or too long,
            ``logprob_token_ids`` would change the answers of others, or the workers have no room
            for the parameters.
    """
    if params.logprob_token_ids and not engine.margins_by_logprobs:
        raise RequestError(
            "logprob_token_ids: vLLM's V1 model runner would give these tokens to every request "
            "of its batch in place of their own; ask for top_logprobs",
            param="logprob_token_ids",
            status=400,
        )
    if adapted:
        context.adapt()
    if not context.grammars:
        check_dictation(params)
    if not context.calls:  # all prompts of a request have the same
        check_room(params, engine.text_ids, engine.bad_word_tokens)
    if params.structured_outputs is not None:
        check_grammar(
            params.structured_outputs,
            allowed=context.grammars,
            most_bytes=settings.max_grammar_bytes,
            most_count=settings.max_grammar_count,
            choices=context.prompts * params.n,
        )


async def outputs_of(call: Call, prompt: object) -> Outputs:
    """Yields vLLM's outputs, without control tokens.

    Raises:
        Exception: vLLM's error for a prompt or for parameters that cannot be decided on.
    """
    hider, context = call.engine.hider, call.context
    try:
        checked = _checked(call, _unmarked(call, prompt))
        visible = hider.visible(checked.ids)
        async with aclosing(passes(call, checked)) as stream:
            async for output in stream:
                hider.hide(output, visible)
                _note_refusals(call, output)
                context.started = True
                yield output
    except RequestError as error:
        context.failure = failure_of(error)
        raise call.engine.vllm_error(error) from error
    except Exception as error:
        context.failure = call.engine.failure(error)
        raise


async def decision_of(call: Call, prompt: object) -> Decision:
    """Only decides; nothing of the call counts as traffic.

    Raises:
        RequestError: The prompt is too long or holds control tokens of the client's.
    """
    checked = _checked(call, without_tokens(token_prompt(prompt), (call.engine.mark_id,)))
    decider = Decider(call, counts=False)
    output, margins = await decider.ask(checked.rendered, checked.decided)
    return decider.decided(output.outputs[0], margins)


def _unmarked(call: Call, prompt: object) -> TokenPrompt:
    rendered, mark_id = token_prompt(prompt), call.engine.mark_id
    unmarked = without_tokens(rendered, (mark_id,))
    if unmarked is not rendered and not call.context.marked:
        raise RequestError(
            f"the prompt holds the id {mark_id}, which is no token of this model",
            param="prompt",
            status=400,
        )
    return unmarked


def _checked(call: Call, prompt: TokenPrompt) -> CheckedPrompt:
    engine, context, ids = call.engine, call.context, prompt["prompt_token_ids"]
    # Each step of a beam search brings the text so far, which grows to the context's end.
    text_so_far = context.beam_search and call.number > 0
    if not text_so_far:
        check_length(ids, engine.model_config.max_model_len)
    end = decision_step(
        ids,
        engine.opening,
        engine.hider.control_ids,
        written=context.history_of(0 if context.beam_search else call.number),
        opens_turn=context.opens_turn and not text_so_far,
        continues=context.continues,
    )
    check_params(call.params, engine.hider.control_ids)
    if not context.beam_search:
        _take_logprobs(call, len(ids))
    decided = ids if end == len(ids) else ids[:end]
    if engine.manifest.kept:
        return CheckedPrompt(prompt, ids, decided)
    # Only now: until here they mark and count the assistant's turns, and whatever moves, repeats or
    # cuts off a turn was rejected as it is where they are kept.
    prompt = without_tokens(prompt, engine.hider.control_ids)
    return CheckedPrompt(prompt, prompt["prompt_token_ids"], engine.hider.visible(decided))


def _take_logprobs(call: Call, prompt_tokens: int) -> None:
    params, context = call.params, call.context
    logprobs = logprobs_of(params, prompt_tokens, streamed=call.streamed)
    if logprobs.each_step and not context.names_length:
        left = (context.logprobs - logprobs.prompt) // max(1, context.prompts - call.number)
        fitting = max(1, left // logprobs.each_step)
        asked = params.max_tokens
        params.max_tokens = fitting if asked is None else min(asked, fitting)
    answer = logprobs.each_step * (params.max_tokens or 1)
    context.hold_piece(logprobs.each_piece)
    context.take_logprobs(logprobs.prompt + answer)


def _note_refusals(call: Call, output: "RequestOutput") -> None:
    if call.context.beam_search:  # these are steps of beams; vLLM makes the text of them
        return
    texts = call.context.refusal_texts
    for choice in output.outputs:
        place = (call.number, choice.index)
        decision = call.context.decisions.get(place)
        if decision is not None and decision.category is not None:
            said = texts.get(place, "") if call.streamed else ""
            texts[place] = said + choice.text
