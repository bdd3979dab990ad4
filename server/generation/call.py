"""One call of ``generate()``: the decision, and the answer or refusal that follows it.

Prompts, parameters and outputs are vLLM's own objects. This module imports no vllm, so it takes
them as they are; what must be made of vLLM's classes the engine makes.
"""

import copy
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, Protocol

from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.errors import RequestError
from models.manifest import Manifest
from server.context import Decision, DecisionContext
from server.generation.grammars import grammar_failed
from server.generation.margins import MarginBoard, Margins, Ticket
from server.generation.outputs import Hider, drop_first_token
from server.generation.prompts import (
    check_length,
    check_params,
    decision_step,
    logprobs_of,
    prompt_ids,
    with_ids,
    without_id,
)
from server.telemetry import metrics
from server.telemetry.recorder import MarginRecorder
from server.web.errors import Failure, failure_of

Outputs = AsyncGenerator[Any, None]


class Engine(Protocol):
    """What a call needs of the engine.

    Attributes:
        manifest: The served checkpoint's.
        hider: Takes its control tokens out of outputs.
        opening: Ids that the chat template puts in front of every decision step.
        turn_ids: Those that open a turn, which no answer holds.
        category_of: Index of each refusal token's category, by id.
        mark_id: What server/web/guard.py breaks special tokens with.
        recorder: Counts the margins of a share of the requests.
        margin_board: Where the worker writes margins.
        margins_by_logprobs: Whether a decision pass may ask for the log-probabilities of the
            control tokens, without others of its batch getting them.
        model_config: vLLM's.
    """

    manifest: Manifest
    hider: Hider
    opening: list[int]
    turn_ids: frozenset[int]
    category_of: dict[int, int]
    mark_id: int
    recorder: MarginRecorder | None
    margin_board: MarginBoard
    margins_by_logprobs: bool
    model_config: Any

    def generate_stock(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> Outputs:
        """Generates without any decision of ours."""

    def decision_params(self, params: Any, *, choices: int, margins: bool) -> Any:
        """Returns parameters of a decision pass: one token, nothing of the client's but its draw.

        Args:
            params: The request's own.
            choices: How many are decided.
            margins: Whether the raw log-probabilities of the control tokens are wanted.
        """

    def merge(self, streams: Sequence[Outputs], params: Any) -> Outputs:
        """Merges the streams of a request's choices into its outputs."""

    def vllm_error(self, error: RequestError) -> Exception:
        """Returns what vLLM's routes answer as the error says."""

    def failure(self, error: Exception) -> Failure:
        """Returns what vLLM's routes would tell of an error of vLLM's."""


class _Asked(NamedTuple):
    """What a decision pass gave.

    Attributes:
        output: vLLM's.
        seen: The margins, where they are wanted and came back.
    """

    output: Any
    seen: Margins | None


class Generation:
    """One call of ``generate()``.

    Args:
        engine: The engine.
        context: The HTTP request's.
        call: Number of this call within the request.
        params: vLLM's ``SamplingParams``.
        request_id: vLLM's.
        options: What else ``generate()`` was given.
    """

    def __init__(
        self,
        engine: Engine,
        context: DecisionContext,
        call: int,
        params: Any,
        request_id: str,
        options: dict[str, Any],
    ) -> None:
        self.engine = engine
        self.context = context
        self.call = call
        self.params = params
        self.request_id = request_id
        self.options = options
        self.delta = params.output_kind.name == "DELTA"
        self.started_s = time.monotonic()
        recorder = engine.recorder
        self.records = (
            recorder is not None
            and not options.get("lora_request")  # its margins are another model's
            and recorder.draws_next()
        )
        self.wants_margins = context.report or self.records or not context.enforce
        self.texts: dict[int, str] = {}
        if context.texts:
            texts = zip(engine.manifest.categories, context.texts, strict=False)
            self.texts = {category.id: text for category, text in texts if text is not None}

    async def decision(self, prompt: Any) -> Decision:
        """Only decides; nothing of it counts as traffic.

        Raises:
            RequestError: The prompt is too long or holds control tokens of the client's.
        """
        self.records = False
        prompt = without_id(prompt, self.engine.mark_id)
        ids, _ = self._checked_ids(prompt)
        asked = await self._ask(prompt, ids)
        return self._decided(asked.output.outputs[0], asked.seen)

    async def outputs(self, prompt: Any) -> Outputs:
        """Yields vLLM's outputs, without control tokens.

        Raises:
            Exception: What the engine makes of a prompt or of parameters that cannot be decided on.
        """
        hider = self.engine.hider
        try:
            prompt = self._unmarked(prompt)
            ids, decided = self._checked_ids(prompt)
            visible = hider.visible(ids)
            async with aclosing(self._stream(prompt, ids, decided)) as stream:
                async for output in stream:
                    hider.hide(output, visible)
                    self._note_refusals(output)
                    self.context.started = True
                    yield output
        except RequestError as error:
            self.context.failure = failure_of(error)
            raise self.engine.vllm_error(error) from error
        except Exception as error:
            self.context.failure = self.engine.failure(error)
            raise

    def _unmarked(self, prompt: Any) -> Any:
        kept = without_id(prompt, self.engine.mark_id)
        if kept is not prompt and not self.context.marked:
            raise RequestError(
                f"the prompt holds the id {self.engine.mark_id}, which is no token of this model",
                param="prompt",
                status=400,
            )
        return kept

    def _stream(self, prompt: Any, ids: list[int], decided: list[int]) -> Outputs:
        if self.context.beam_search:
            if self.context.continues:
                raise RequestError("use_beam_search cannot continue a message", status=400)
            if self.texts:
                raise RequestError(
                    "use_beam_search: this policy's refusals are no beams", status=400
                )
            return self._beam(prompt, ids)
        if self._needs_decision_first():
            return self._decide_first(prompt, ids, decided)
        return self._in_one_pass(prompt, ids)

    def _checked_ids(self, prompt: Any) -> tuple[list[int], list[int]]:
        """Returns a prompt's ids, and those of them that the decision sees."""
        ids, context = prompt_ids(prompt), self.context
        controls = self.engine.hider.control_ids
        text_so_far = context.beam_search and self.call > 0
        if not text_so_far:
            check_length(ids, self.engine.model_config.max_model_len)
        end = decision_step(
            ids,
            self.engine.opening,
            controls,
            written=context.history_of(0 if context.beam_search else self.call),
            opens_turn=context.opens_turn and not text_so_far,
            continues=context.continues,
        )
        check_params(self.params, controls)
        if not context.beam_search:
            self._take_logprobs(len(ids))
        return ids, ids if end == len(ids) else ids[:end]

    def _take_logprobs(self, prompt_tokens: int) -> None:
        params, context = self.params, self.context
        logprobs = logprobs_of(params, prompt_tokens, streamed=self.delta)
        if logprobs.each_step and not context.names_length:
            left = (context.logprobs - logprobs.prompt) // max(1, context.prompts - self.call)
            fitting = left // logprobs.each_step
            params.max_tokens = max(1, min(params.max_tokens, fitting))
        answer = logprobs.each_step * (params.max_tokens or 1)
        context.hold_piece(logprobs.each_piece)
        context.take_logprobs(logprobs.prompt + answer)

    def _needs_decision_first(self) -> bool:
        # Whatever could reach the control logits before our processor does, or show the control
        # token in the text. The paper's rule reads all other logits too; tokens that end the
        # request are masked while min_tokens are not reached. The draws of a seed begin with the
        # first token that the client sees.
        params = self.params
        reads_all = self.context.controls.rule is Rule.PAPER
        return bool(
            self.context.continues
            or params.structured_outputs is not None
            or params.allowed_token_ids
            or params.bad_words
            or params.repetition_penalty != 1.0
            or params.thinking_token_budget is not None
            or (params.seed is not None and params.temperature > 0)
            or not params.skip_special_tokens
            or (reads_all and (params.logit_bias or params.min_tokens))
            or (self.texts and params.min_tokens)
            or (self.context.has_floor and _shapes_text(params))
        )

    async def _in_one_pass(self, prompt: Any, ids: list[int]) -> Outputs:
        board = self.engine.margin_board
        ticket = await board.take() if self.wants_margins else None
        opened: set[int] = set()
        try:
            params = self._with_decision(ticket)
            stream = self.engine.generate_stock(prompt, params, self.request_id, **self.options)
            async with aclosing(stream):
                async for output in stream:
                    for choice in output.outputs:
                        if choice.index not in opened and choice.token_ids:
                            opened.add(choice.index)
                            seen = await self._seen(prompt, ids, ticket)
                            self._record(choice.index, self._decided(choice, seen), output)
                            self._open(choice)
                        elif not self.delta and choice.token_ids:
                            drop_first_token(choice)
                    shows = any(c.token_ids or c.finish_reason is not None for c in output.outputs)
                    if shows or output.finished or output.prompt_logprobs:
                        yield output
        finally:
            if ticket is not None:
                board.give_back(ticket)

    def _with_decision(self, ticket: Ticket | None) -> Any:
        params = self._steered(self.params, ticket)
        if self.texts:
            params.stop_token_ids = [*(params.stop_token_ids or ()), *self.texts]
            params._all_stop_token_ids |= self.texts.keys()
        if params.max_tokens is not None:
            params.max_tokens = min(params.max_tokens, self.engine.model_config.max_model_len) + 1
        if params.min_tokens:
            params.min_tokens += 1
        return params

    async def _seen(self, prompt: Any, ids: list[int], ticket: Ticket | None) -> Margins | None:
        written = ticket and self.engine.margin_board.read(ticket)
        if ticket is None or written or not self.engine.margins_by_logprobs:
            return written
        # A worker on another machine writes nothing that can be read here.
        return (await self._ask(prompt, ids)).seen

    def _open(self, choice: Any) -> None:
        token = choice.token_ids[0]
        drop_first_token(choice)
        if token in self.texts:
            _end_with(choice, self.texts[token])

    async def _decide_first(self, prompt: Any, ids: list[int], decided: list[int]) -> Outputs:
        final = await self._decision_pass(prompt, decided)
        streams = [
            self._continue(prompt, ids, decided, choice.token_ids[0], index)
            if choice.token_ids[0] not in self.texts
            else self._ended(final, choice)
            for index, choice in enumerate(self._choices(final))
        ]
        one_stream = streams[0] if len(streams) == 1 else self.engine.merge(streams, self.params)
        async with aclosing(one_stream):
            async for output in one_stream:
                yield output

    async def _decision_pass(self, prompt: Any, decided: list[int]) -> Any:
        final, seen = await self._ask(prompt, decided)
        for index, choice in enumerate(self._choices(final)):
            self._record(index, self._decided(choice, seen), final)
        return final

    def _choices(self, final: Any) -> list[Any]:
        drawn: list[Any] = final.outputs
        return drawn if len(drawn) == self.params.n else drawn * self.params.n

    async def _ended(self, final: Any, choice: Any) -> Outputs:
        # The decision pass is all there is: its output becomes the answer.
        output, ended = copy.copy(final), copy.copy(choice)
        text = self.texts[ended.token_ids[0]]
        ended.token_ids, ended.index = [], 0
        ended.logprobs = None if self.params.logprobs is None else []
        _end_with(ended, text)
        output.request_id, output.outputs, output.finished = self.request_id, [ended], True
        yield output

    async def _ask(self, prompt: Any, decided: list[int]) -> _Asked:
        if not self.wants_margins:
            return _Asked(await self._one_token(prompt, decided), None)
        if self.engine.margins_by_logprobs:
            final = await self._one_token(prompt, decided, by_logprobs=True)
            return _Asked(final, self._seen_in(final.outputs[0]))
        board = self.engine.margin_board
        ticket = await board.take()
        try:
            final = await self._one_token(prompt, decided, ticket)
            return _Asked(final, board.read(ticket))
        finally:
            board.give_back(ticket)

    async def _one_token(
        self,
        prompt: Any,
        decided: list[int],
        ticket: Ticket | None = None,
        *,
        by_logprobs: bool = False,
    ) -> Any:
        # Greedy and the paper's rule choose the same token for every choice of a request.
        draws = self.context.controls.rule is Rule.SAMPLE
        choices = self.params.n if draws else 1
        params = self.engine.decision_params(self.params, choices=choices, margins=by_logprobs)
        final = None
        stream = self.engine.generate_stock(
            with_ids(prompt, decided),
            self._steered(params, ticket),
            f"{self.request_id}-decision",
            **self.options,
        )
        async for output in stream:
            final = output
        if final is None or not all(choice.token_ids for choice in final.outputs):
            raise RequestError("the request was aborted before its decision", status=400)
        return final

    def _continue(
        self, prompt: Any, ids: list[int], decided: list[int], token: int, index: int
    ) -> Outputs:
        refused = token in self.engine.category_of
        params = copy.copy(self.params)
        params.n = 1
        if params.seed is not None:
            params.seed += index
        if refused:
            params.structured_outputs = None
            if self.context.has_floor:
                _leave_to_model(params)
        params.extra_args = _without_controls(params.extra_args)
        goes_on = self.context.continues and not refused
        request_id = self.request_id if self.params.n == 1 else f"{self.request_id}-{index}"
        stream = self.engine.generate_stock(
            with_ids(prompt, ids if goes_on else [*decided, token]),
            params,
            request_id,
            **self.options,
        )
        return stream if params.structured_outputs is None else _by_grammar(stream)

    async def _beam(self, prompt: Any, ids: list[int]) -> Outputs:
        # vLLM's beam search calls once a beam and step, with the text so far as the prompt. The
        # first call, alone by construction, decides; all of them go on after its token.
        if self.call == 0:
            self.context.beam_start = len(ids)
            (choice,) = (await self._decision_pass(prompt, ids)).outputs
            self.context.beam_token = choice.token_ids[0]
        start = self.context.beam_start
        params = copy.copy(self.params)
        params.extra_args = _without_controls(params.extra_args)
        after = [*ids[:start], self.context.beam_token, *ids[start:]]
        stream = self.engine.generate_stock(
            with_ids(prompt, after), params, self.request_id, **self.options
        )
        async with aclosing(stream):
            async for output in stream:
                # vLLM goes on with the likeliest of these, not with the token that was sampled.
                for choice in output.outputs:
                    choice.logprobs = choice.logprobs and [
                        {t: value for t, value in step.items() if t not in self.engine.turn_ids}
                        for step in choice.logprobs
                    ]
                yield output

    def _steered(self, params: Any, ticket: Ticket | None = None) -> Any:
        controls = self.context.controls
        steered = copy.copy(params)
        steered.skip_clone = True
        steered._all_stop_token_ids = set(params._all_stop_token_ids)
        if controls.rule is Rule.SAMPLE and steered.seed is None:
            # The worker draws from the seed, and vLLM gives each of n choices its own.
            steered.seed = secrets.randbits(31)
        if not self.context.enforce:
            controls = Controls.never(len(controls.bias))
        wire = controls.to_wire()
        if ticket is not None:
            wire["ticket"] = ticket
        steered.extra_args = {**(params.extra_args or {}), EXTRA_ARGS_KEY: wire}
        return steered

    def _record(self, index: int, decision: Decision, output: Any) -> None:
        self.context.decisions[self.call, index] = decision
        if self.records and decision.margins is not None and self.engine.recorder is not None:
            self.records = False  # once a request, however many its choices
            self.engine.recorder.add(self.context.policy, decision.margins)
        # A whole answer is seen when it ends; vLLM's own statistics know when it began.
        stats = output.metrics
        waited_s = stats.first_token_latency if stats else time.monotonic() - self.started_s
        category = decision.category if self.context.enforce else decision.shadow
        metrics.count_decision(
            None if category is None else self.engine.manifest.names[category],
            rule=self.context.controls.rule,
            asked_rates=self.context.dials.asked_rates,
            waited_s=waited_s,
            policy=self.context.policy,
            clamped=self.context.dials.clamped,
            enforced=self.context.enforce,
        )

    def _decided(self, choice: Any, seen: Margins | None) -> Decision:
        category = self.engine.category_of.get(choice.token_ids[0])
        if seen is None:
            if self.context.report or not self.context.enforce:
                raise RequestError(
                    "the margins that this needs cannot come back: vLLM's worker shares no memory "
                    "with the server, and its V1 model runner has no other way",
                    param="refusal.report",
                )
            return Decision(category)
        shadow = None if self.context.enforce else self._shadow(seen)
        return Decision(category, seen.margins, seen.log_normaliser, shadow)

    def _shadow(self, seen: Margins) -> int | None:
        from models.decision import refused_category  # it needs torch

        params = self.params
        return refused_category(*seen, self.context.controls, params.temperature, params.seed)

    def _seen_in(self, choice: Any) -> Margins:
        step = choice.logprobs[0]
        manifest = self.engine.manifest
        respond = step[manifest.respond.id].logprob
        return Margins(-respond, tuple(step[c.id].logprob - respond for c in manifest.categories))

    def _note_refusals(self, output: Any) -> None:
        if self.context.beam_search:  # these are steps of beams, and vLLM makes the text of them
            return
        texts = self.context.refusal_texts
        for choice in output.outputs:
            place = (self.call, choice.index)
            decision = self.context.decisions.get(place)
            if decision is not None and decision.category is not None:
                texts[place] = texts.get(place, "") + choice.text if self.delta else choice.text


def _shapes_text(params: Any) -> bool:
    return bool(
        params.logit_bias
        or params.min_tokens
        or params.ignore_eos
        or params.presence_penalty
        or params.frequency_penalty
        or params.temperature > 1
    )


def _leave_to_model(params: Any) -> None:
    """Takes out what could make a compliant answer of a refusal's text, in place."""
    params.logit_bias = params.allowed_token_ids = params._bad_words_token_ids = None
    params.bad_words = []
    params.min_tokens, params.ignore_eos = 0, False
    params.presence_penalty = params.frequency_penalty = 0.0
    params.repetition_penalty = 1.0
    params.temperature = min(params.temperature, 1.0)


async def _by_grammar(stream: Outputs) -> Outputs:
    # vLLM ends the request and would answer with an internal error.
    async with aclosing(stream):
        async for output in stream:
            if output.outputs[0].finish_reason == "error":
                raise grammar_failed()
            yield output


def _end_with(choice: Any, text: str) -> None:
    choice.text = text
    choice.finish_reason, choice.stop_reason = "stop", None


def _without_controls(extra_args: dict[str, Any] | None) -> dict[str, Any] | None:
    return {k: v for k, v in (extra_args or {}).items() if k != EXTRA_ARGS_KEY} or None
