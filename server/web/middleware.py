"""The one layer of ours around vLLM's app, pure ASGI: what comes in, and what goes out."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import NotAllowedError, RequestError
from models.manifest import Manifest
from server.apis.shaping import Shaper
from server.apis.turns import READS_CHAT, RESPONSES, open_turns
from server.apis.verdicts import Verdicts
from server.context import BODY, CALLER, DECISION_CONTEXT, DecisionContext
from server.dials.protocol import (
    FIELD,
    REFUSAL_AND_CONTENT,
    RefusalOptions,
    check_refusal_in,
    parse_options,
)
from server.policies.book import ActivePolicy, CallerSource
from server.policies.credentials import now
from server.settings import Settings
from server.telemetry import metrics
from server.telemetry.trace import DecisionTrace, Traced
from server.web.access import NO_ROUTE
from server.web.admission import Admission
from server.web.answer import Answer
from server.web.bodies import (
    CLIENT_GONE,
    aside,
    flag,
    replay_body,
    with_header_dials,
    with_length,
)
from server.web.gate import Arrival, Gate
from server.web.guard import Guard
from server.web.limits import number, prompts_in, write_json
from server.web.score import SCORE

INVOCATIONS = "/invocations"
GENERATING = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        INVOCATIONS,
    }
)
COUNTED = GENERATING | {SCORE}
READS_BEAM_SEARCH = frozenset({"/v1/chat/completions", "/v1/completions", "/invocations"})
# No chat template makes the prompt of these; all others end where the decision step begins.
RAW_PROMPTS = frozenset({"/v1/completions"})
# They show the ids of a prompt as the model reads it: earlier turns with their control tokens,
# where the checkpoint keeps them.
RENDERS = {
    f"{path}/render": path for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages")
}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


# Holds a request's observation open: a span, an id for the log.
Observer = Callable[[Arrival, Answer], AbstractContextManager[None]]


class Prepared(NamedTuple):
    """One request that the engine may answer.

    Attributes:
        raw: The body that vLLM reads.
        options: The request's own dials.
        context: What the engine is told.
    """

    raw: bytes
    options: RefusalOptions
    context: DecisionContext


class RefusalMiddleware:
    """The one layer around vLLM's app.

    What may not come in is answered here. Of a request that generates, the dials go down to the
    engine through a context variable, and its answer is shaped on the way up.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        manifest: Manifest,
        settings: Settings,
        guard: Guard,
        callers: CallerSource,
        admission: Admission,
        trace: DecisionTrace | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._app = app
        self._manifest = manifest
        self._settings = settings
        self._guard = guard
        self._gate = Gate(settings, callers, admission, COUNTED, frozenset(RENDERS))
        self._trace = trace
        self._observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request or lifespan; the server takes no websockets."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        arrival = Arrival(scope)
        answer = Answer(send, arrival.path)
        in_flight = int(arrival.path in COUNTED)
        metrics.count_in_flight(in_flight)
        try:
            with ExitStack() as observed:
                for observe in self._observers:
                    observed.enter_context(observe(arrival, answer))
                await self._serve(arrival, answer.heeding(receive), answer)
        finally:
            metrics.count_in_flight(-in_flight)
            if arrival.place is not None:
                arrival.place.leave()
            self._record(arrival, answer)

    async def _serve(self, arrival: Arrival, receive: Receive, answer: Answer) -> None:
        received = now() if self._trace is not None else None
        prepared: Prepared | None = None
        try:
            await self._gate.admit(arrival, receive)
            if arrival.body is not None and arrival.path in GENERATING:
                prepared = await self._prepared(arrival, arrival.body)
                arrival.context = prepared.context
            raw = self._unsteered(arrival) if prepared is None else prepared.raw
        except RequestError as error:
            error.message = error.message.replace(self._guard.mark, "")
            await answer.refuse(error)
            return
        scope = {**arrival.scope, CALLER: arrival.caller, BODY: arrival.body}
        if raw is not None:
            scope["headers"] = with_length(scope["headers"], len(raw)) if raw else scope["headers"]
            receive = replay_body(raw, receive)
        if prepared is None:
            if arrival.path in RENDERS and not self._manifest.kept:
                answer.rewrite(partial(_without_tokens, frozenset(self._manifest.control_ids)))
            await self._app(scope, receive, answer)
            return
        try:
            await self._steer(prepared, scope, receive, answer)
        finally:
            if self._trace is not None and received is not None:
                self._trace.add(Traced(received, _tenant(arrival), arrival.path, *prepared[1:]))

    async def _prepared(self, arrival: Arrival, body: dict[str, Any]) -> Prepared:
        assert arrival.caller is not None
        body = with_header_dials(body, arrival.headers)
        options = parse_options(body[FIELD]) if FIELD in body else RefusalOptions()
        policy = arrival.caller.policy(options.policy)
        size = len(arrival.raw or b"")
        return await aside(size, self._prepare, body, arrival.path, options, policy)

    def _unsteered(self, arrival: Arrival) -> bytes | None:
        if arrival.body is None:
            return arrival.raw
        if arrival.path in RENDERS:
            turns = open_turns(arrival.body, RENDERS[arrival.path], self._manifest)
            return write_json(turns.body)
        return write_json(arrival.body)

    async def _steer(
        self, prepared: Prepared, scope: Scope, receive: Receive, answer: Answer
    ) -> None:
        context, body = prepared.context, scope[BODY]
        verdicts = Verdicts(self._manifest, context, choices_per_prompt=max(1, number(body, "n")))
        answer.shape(
            context,
            Shaper(verdicts, echo=flag(body, "echo")),
            self._guard.mark.encode() if context.marked else b"",
        )
        token = DECISION_CONTEXT.set(context)
        try:
            await self._app(scope, receive, answer)
        except RuntimeError as error:
            # What starlette makes of an error that it has an answer for, but no place any more.
            if error.__cause__ is None or not await answer.end_failed():
                raise
        finally:
            DECISION_CONTEXT.reset(token)

    def _record(self, arrival: Arrival, answer: Answer) -> None:
        label = NO_ROUTE if arrival.route is None else arrival.route.path
        if answer.refused or arrival.path in COUNTED:
            metrics.count_request(label, answer.status)
        failure = answer.failure
        if answer.refused and failure is not None:
            metrics.count_rejection(failure.code)
        # A client that has gone was denied nothing.
        if self._trace is None or failure is None or failure.status >= CLIENT_GONE:
            return
        request_id = arrival.headers.get("x-request-id")
        self._trace.denials.add(failure, label, _tenant(arrival), request_id)

    def _prepare(
        self, body: dict[str, Any], path: str, options: RefusalOptions, policy: ActivePolicy
    ) -> Prepared:
        # Takes our field out of a body and writes the history's control tokens into it.
        report = policy.reports(options)
        unread = {**body}
        unread.pop(FIELD, None)
        opens_turn = not (path in RAW_PROMPTS or (path == INVOCATIONS and "prompt" in body))
        if not opens_turn:
            policy.check_raw_prompts()
        guarded = self._guard.guarded(unread, refuse=policy.control_text == "refuse")
        turns = open_turns(guarded, path, self._manifest)
        if turns.continues:
            policy.check_prefill("input" if path == RESPONSES else "continue_final_message")
        context = DecisionContext(
            dials=policy.board.resolve(options, explain=report),
            report=report,
            history=turns.counts,
            continues=turns.continues,
            beam_search=path in READS_BEAM_SEARCH and flag(body, "use_beam_search"),
            opens_turn=opens_turn,
            marked=guarded is not unread,
            grammars=policy.grammars,
            has_floor=policy.board.bounds.has_floor,
            policy=policy.name,
            enforce=policy.enforce,
            texts=policy.refusal_texts,
            in_content=_in_content(options, policy, chat=opens_turn and path in READS_CHAT),
            logprobs=self._settings.max_logprobs,
            piece_logprobs=self._settings.max_logprobs // 8,
            prompts=prompts_in(body),
            names_length=_names_length(body),
        )
        if context.beam_search:
            _check_beams(body, has_floor=context.has_floor)
        return Prepared(write_json(turns.body), options, context)


def _in_content(options: RefusalOptions, policy: ActivePolicy, *, chat: bool) -> bool:
    if not chat:
        check_refusal_in(options)
    return policy.shows_refusals_in(options) == REFUSAL_AND_CONTENT


def _names_length(body: dict[str, Any]) -> bool:
    return [body.get(name) for name in LENGTHS] != [None] * len(LENGTHS)


def _without_tokens(tokens: frozenset[int], rendered: dict[str, Any]) -> dict[str, Any]:
    ids = rendered["token_ids"]
    parallel = {
        name: rendered[name] for name in ("token_ids", "token_offsets") if rendered.get(name)
    }
    return rendered | {
        name: [entry for token, entry in zip(ids, entries, strict=True) if token not in tokens]
        for name, entries in parallel.items()
    }


def _tenant(arrival: Arrival) -> str | None:
    return None if arrival.caller is None else arrival.caller.tenant


def _check_beams(body: dict[str, Any], *, has_floor: bool) -> None:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise RequestError("use_beam_search takes one prompt a request", param="prompt", status=400)
    if has_floor and flag(body, "ignore_eos"):
        raise NotAllowedError(
            "ignore_eos with use_beam_search: under a floor a refusal ends where the model ends it",
            param="ignore_eos",
        )
