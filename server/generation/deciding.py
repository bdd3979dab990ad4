"""Asks the engine for decisions, reads them with their margins, and records them."""

import time
from typing import TYPE_CHECKING, NamedTuple

from models.controls import Rule
from models.errors import RequestError, ServiceError
from server.context import Decision
from server.generation.margins import Margins, Ticket
from server.generation.parameters import steered
from server.generation.prompts import TokenPrompt, with_ids
from server.generation.seam import Call
from server.telemetry import metrics

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput
    from vllm.sampling_params import SamplingParams


class DecisionOutput(NamedTuple):
    """What a decision pass gave.

    Attributes:
        output: vLLM's.
        margins: None where they are not wanted, or did not come back.
    """

    output: "RequestOutput"
    margins: Margins | None


class Decider:
    """The decisions of one call.

    Args:
        call: Whose decisions.
        counts: Whether the call is traffic, whose margins may be recorded.
    """

    def __init__(self, call: Call, *, counts: bool = True) -> None:
        recorder = call.engine.recorder
        self._call = call
        self._recorder = None
        # An adapter's margins are another model's.
        adapted = call.options.get("lora_request")
        if counts and recorder is not None and not adapted and recorder.draws_next():
            self._recorder = recorder
        context = call.context
        self.wants_margins = context.report or bool(self._recorder) or not context.enforce

    async def first(self, prompt: TokenPrompt, ids: list[int]) -> "RequestOutput":
        """Makes a decision pass and records its decisions.

        Args:
            prompt: The whole prompt.
            ids: Those of its ids that the decision sees.

        Raises:
            RequestError: The request ended before its decision, or margins cannot come back.
        """
        asked = await self.ask(prompt, ids)
        for index, choice in enumerate(self.choices(asked.output)):
            self.record(index, self.decided(choice, asked.margins), asked.output)
        return asked.output

    def choices(self, output: "RequestOutput") -> "list[CompletionOutput]":
        """Returns the decision of each choice: a rule that draws nothing decides once for all."""
        n, drawn = self._call.params.n, output.outputs
        return drawn if len(drawn) == n else drawn * n

    async def ask(self, prompt: TokenPrompt, ids: list[int]) -> DecisionOutput:
        """Makes a decision pass: one token. Arguments and errors are those of ``first``."""
        if not self.wants_margins:
            return DecisionOutput(await self._one_token(prompt, ids), None)
        board = self._call.engine.margin_board
        ticket = await board.take()
        try:
            output = await self._one_token(prompt, ids, ticket)
            written = board.read(ticket)
        finally:
            board.give_back(ticket)
        return DecisionOutput(output, written or await self._logprobs_margins(prompt, ids))

    async def margins(
        self, prompt: TokenPrompt, ids: list[int], ticket: Ticket | None
    ) -> Margins | None:
        """Returns the margins that the worker wrote for a ticket.

        A worker on another machine writes nothing that can be read here. Then they are asked for
        once more, where vLLM's model runner allows it.
        """
        if ticket is None:
            return None
        written = self._call.engine.margin_board.read(ticket)
        return written or await self._logprobs_margins(prompt, ids)

    async def _logprobs_margins(self, prompt: TokenPrompt, ids: list[int]) -> Margins | None:
        if not self._call.engine.margins_by_logprobs:
            return None
        output = await self._one_token(prompt, ids, by_logprobs=True)
        return self._margins_in(output.outputs[0])

    def decided(self, choice: "CompletionOutput", margins: Margins | None) -> Decision:
        """Returns the decision that a choice opens with.

        Raises:
            RequestError: Its margins are needed and did not come back.
            ServiceError: The engine decides nothing.
        """
        context, token = self._call.context, choice.token_ids[0]
        if token not in self._call.engine.hider.control_ids:
            raise ServiceError("the engine opened an answer with no control token: is it steered?")
        category = self._call.engine.category_of.get(token)
        if margins is not None:
            shadow = None if context.enforce else self._shadow(margins)
            return Decision(category, margins.margins, margins.log_normaliser, shadow)
        if context.report or not context.enforce:
            raise RequestError(
                "the margins that this needs cannot come back: vLLM's worker shares no memory "
                "with the server, and its model runner has no other way",
                param="refusal.report",
            )
        return Decision(category)

    def record(self, index: int, decision: Decision, output: "RequestOutput") -> None:
        """Records a decision for the HTTP layer, and counts it."""
        call, context = self._call, self._call.context
        context.decisions[call.number, index] = decision
        if self._recorder is not None and decision.margins is not None:
            self._recorder.add(context.policy, decision.margins)
            self._recorder = None  # once a request, however many its choices
        # A whole answer is seen when it ends; vLLM's own statistics know when it began.
        stats = output.metrics
        waited_s = stats.first_token_latency if stats else time.monotonic() - call.started_s
        category = decision.category if context.enforce else decision.shadow
        metrics.count_decision(
            None if category is None else call.engine.manifest.names[category],
            rule=context.controls.rule,
            asked_rates=context.dials.asked_rates,
            waited_s=waited_s,
            policy=context.policy,
            clamped=context.dials.clamped,
            enforced=context.enforce,
        )

    async def _one_token(
        self,
        prompt: TokenPrompt,
        ids: list[int],
        ticket: Ticket | None = None,
        *,
        by_logprobs: bool = False,
    ) -> "RequestOutput":
        call = self._call
        draws = call.context.controls.rule is Rule.SAMPLE
        choices = call.params.n if draws else 1
        params = call.engine.decision_params(call.params, choices=choices, margins=by_logprobs)
        final = None
        params = steered(params, call.context, ticket)
        async for output in call.stock(with_ids(prompt, ids), params, "-decision"):
            final = output
        if final is None or not all(choice.token_ids for choice in final.outputs):
            raise RequestError("the request was aborted before its decision", status=400)
        return final

    def _shadow(self, margins: Margins) -> int | None:
        from models.decision import refused_category  # it needs torch

        params: SamplingParams = self._call.params
        controls = self._call.context.controls
        return refused_category(*margins, controls, params.temperature, params.seed)

    def _margins_in(self, choice: "CompletionOutput") -> Margins | None:
        if not choice.logprobs:
            return None  # in a step with another request's drafts vLLM returns none
        step = choice.logprobs[0]
        manifest = self._call.engine.manifest
        respond = step[manifest.respond.id].logprob
        return Margins(-respond, tuple(step[c.id].logprob - respond for c in manifest.categories))
