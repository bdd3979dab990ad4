"""The passes through the engine that one answer takes: one, decision first, or one a beam step."""

import copy
from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from models.errors import RequestError
from server.context import DecisionContext
from server.generation.deciding import Decider
from server.generation.grammars import grammar_failed
from server.generation.margins import Ticket
from server.generation.outputs import begin_with, drop_first_token, end_with, without_ids
from server.generation.parameters import (
    after_decision,
    leave_to_model,
    needs_decision_first,
    steered,
    with_decision_step,
)
from server.generation.prompts import with_ids
from server.generation.seam import Call, CheckedPrompt, Outputs

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams


def passes(call: Call, prompt: CheckedPrompt) -> Outputs:
    """Decides and generates; the opening control tokens are dropped from the outputs.

    Raises:
        RequestError: A beam search asks for what beams cannot do. While iterating: the request
            ended before its decision, no text follows its grammar, or margins cannot come back.
    """
    if call.context.beam_search:
        _check_beams(call)
        return _Beam(call, prompt).outputs()
    kept = call.engine.manifest.kept
    if not kept or needs_decision_first(call.params, call.context, fixed_texts=bool(call.texts)):
        return _DecisionFirst(call, prompt).outputs()
    return _OnePass(call, prompt).outputs()


class _OnePass:
    """The decision is the first token of the answer's own pass."""

    def __init__(self, call: Call, prompt: CheckedPrompt) -> None:
        self._call = call
        self._prompt = prompt
        self._decider = Decider(call)
        self._opened: set[int] = set()

    async def outputs(self) -> Outputs:
        board = self._call.engine.margin_board
        ticket = await board.take() if self._decider.wants_margins else None
        try:
            async with aclosing(self._stream(ticket)) as stream:
                async for output in stream:
                    for choice in output.outputs:
                        await self._without_decision(choice, output, ticket)
                    if _shows(output):
                        yield output
        finally:
            if ticket is not None:
                board.give_back(ticket)

    def _stream(self, ticket: Ticket | None) -> Outputs:
        call = self._call
        params = steered(call.params, call.context, ticket)
        params = with_decision_step(params, call.texts, call.engine.model_config.max_model_len)
        return call.stock(self._prompt.rendered, params)

    async def _without_decision(
        self, choice: "CompletionOutput", output: "RequestOutput", ticket: Ticket | None
    ) -> None:
        if not choice.token_ids:
            return
        if choice.index not in self._opened:
            self._opened.add(choice.index)
            margins = await self._decider.margins(self._prompt.rendered, self._prompt.ids, ticket)
            self._decider.record(choice.index, self._decider.decided(choice, margins), output)
            text = self._call.texts.get(choice.token_ids[0])
            drop_first_token(choice)
            if text is not None:
                end_with(choice, text)
        elif not self._call.streamed:  # each output holds the whole text so far
            drop_first_token(choice)


def _shows(output: "RequestOutput") -> bool:
    opened = any(c.token_ids or c.finish_reason is not None for c in output.outputs)
    return bool(opened or output.finished or output.prompt_logprobs)


class _DecisionFirst:
    """The decision is a pass of its own; the answer goes on from prompt + control token.

    Where the checkpoint does not keep the token in the context, the answer goes on from the prompt
    alone, as if there were no such tokens, and a refusal is a fixed text or goes on from the
    category's prefix.
    """

    def __init__(self, call: Call, prompt: CheckedPrompt) -> None:
        self._call = call
        self._prompt = prompt

    async def outputs(self) -> Outputs:
        call = self._call
        decider = Decider(call)
        final = await decider.first(self._prompt.rendered, self._prompt.decided)
        choices = decider.choices(final)
        if any(choice.token_ids[0] in call.engine.category_of for choice in choices):
            # A refusal drops some of them, and an answer with them would be rejected.
            call.engine.validate(call.params)
        streams = [self._text(final, choice, index) for index, choice in enumerate(choices)]
        merged = streams[0] if len(streams) == 1 else call.engine.merge(streams, call.params)
        async with aclosing(merged) as outputs:
            async for output in outputs:
                yield output

    def _text(self, final: "RequestOutput", choice: "CompletionOutput", index: int) -> Outputs:
        call, token = self._call, choice.token_ids[0]
        text = call.texts.get(token)
        category = call.engine.category_of.get(token)
        if text is not None:
            return self._ended(final, choice, text)
        if call.engine.manifest.kept or category is None:
            return self._continued(token, index)
        written = call.engine.manifest.categories[category]
        prefix = written.refusal_prefix or ""
        ids = call.engine.text_ids(prefix)
        if len(self._prompt.decided) + len(ids) >= call.engine.model_config.max_model_len:
            return self._ended(final, choice, written.refusal_text)
        return begin_with(prefix, self._continued(token, index, ids), streamed=call.streamed)

    async def _ended(
        self, final: "RequestOutput", choice: "CompletionOutput", text: str
    ) -> Outputs:
        # The decision pass is all there is: its output becomes the answer.
        output, ended = copy.copy(final), copy.copy(choice)
        end_with(ended, text)
        ended.token_ids, ended.index = [], 0
        ended.logprobs = None if self._call.params.logprobs is None else []
        output.request_id, output.outputs = self._call.request_id, [ended]
        output.finished = True
        yield output

    def _continued(self, token: int, index: int, prefix: Sequence[int] = ()) -> Outputs:
        call, prompt = self._call, self._prompt
        refused = token in call.engine.category_of
        params = self._continued_params(index, refused=refused)
        goes_on = call.context.continues and not refused
        opening = [token] if call.engine.manifest.kept else prefix
        stream = call.stock(
            with_ids(prompt.rendered, prompt.ids if goes_on else [*prompt.decided, *opening]),
            params,
            "" if call.params.n == 1 else f"-{index}",
        )
        return stream if params.structured_outputs is None else _by_grammar(stream)

    def _continued_params(self, index: int, *, refused: bool) -> "SamplingParams":
        params = after_decision(self._call.params)
        params.n = 1
        if params.seed is not None:
            params.seed += index
        if refused:
            params.structured_outputs = None
            if self._call.context.has_floor:
                leave_to_model(params, self._call.engine.repetition_penalty)
        return params


async def _by_grammar(stream: Outputs) -> Outputs:
    # vLLM ends the request and would answer with an internal error.
    async with aclosing(stream):
        async for output in stream:
            if output.outputs[0].finish_reason == "error":
                raise grammar_failed()
            yield output


def _check_beams(call: Call) -> None:
    if call.context.continues:
        raise RequestError("use_beam_search cannot continue a message", status=400)
    if call.texts or not call.engine.manifest.kept:
        raise RequestError("use_beam_search: refusals have fixed texts here", status=400)


class _Beam:
    """One step of a beam search.

    vLLM calls ``generate()`` once a beam and step, with the text so far as the prompt. The first
    call, alone by construction, decides; all of them go on after its token.
    """

    def __init__(self, call: Call, prompt: CheckedPrompt) -> None:
        self._call = call
        self._prompt = prompt

    async def outputs(self) -> Outputs:
        call, (rendered, ids, _) = self._call, self._prompt
        context: DecisionContext = call.context
        if call.number == 0:
            context.beam_start = len(ids)
            (choice,) = (await Decider(call).first(rendered, ids)).outputs
            context.beam_token = choice.token_ids[0]
        start = context.beam_start
        after = with_ids(rendered, [*ids[:start], context.beam_token, *ids[start:]])
        async with aclosing(call.stock(after, after_decision(call.params))) as stream:
            async for output in stream:
                # vLLM goes on with the likeliest of these, not with the token that was sampled.
                for choice in output.outputs:
                    choice.logprobs = choice.logprobs and [
                        without_ids(step, call.engine.turn_ids) for step in choice.logprobs
                    ]
                yield output
