"""Pure ASGI: reads the ``refusal`` object before vLLM's handler, shapes the answer after it."""

from typing import Any

from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import NotAllowedError, RequestError
from models.manifest import Manifest
from server.apis.shaping import Shaper
from server.apis.turns import open_turns
from server.apis.verdicts import Verdicts
from server.context import BODY, DECISION_CONTEXT, DecisionContext
from server.dials.protocol import FIELD, RefusalOptions, parse_options
from server.policies.book import ActivePolicy, CallerSource, caller_of
from server.policies.credentials import now
from server.settings import Settings
from server.telemetry import metrics
from server.telemetry.trace import DecisionTrace, Traced
from server.web.access import route_path
from server.web.answer import Answer
from server.web.bodies import (
    aside,
    encode,
    flag,
    parse_body,
    read_body,
    replay_body,
    with_header_dials,
    with_length,
)
from server.web.errors import RESPONSES, error_response
from server.web.guard import Guard
from server.web.limits import prompts_in, write_json
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
READS_BEAM_SEARCH = frozenset({"/v1/chat/completions", "/v1/completions", "/invocations"})
# No chat template makes the prompt of these; all others end where the decision step begins.
RAW_PROMPTS = frozenset({"/v1/completions"})
# They show the ids of a prompt: those of earlier turns with their control tokens.
RENDERS = {
    f"{path}/render": path for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages")
}
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_INT = TypeAdapter(int)


class RefusalMiddleware:
    """Resolves a request's controls and hands them to the engine through a context variable."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        manifest: Manifest,
        settings: Settings,
        guard: Guard,
        callers: CallerSource,
        trace: DecisionTrace | None = None,
    ) -> None:
        self._app = app
        self._manifest = manifest
        self._settings = settings
        self._guard = guard
        self._callers = callers
        self._trace = trace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; everything but a POST to a generating route goes through."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        path = route_path(scope)
        if path in GENERATING or path == SCORE:
            await self._count(path, scope, receive, send)
        elif path in RENDERS:
            await self._render(RENDERS[path], scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _render(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            raw = await read_body(receive, self._settings.max_body_bytes)
            body = parse_body(raw)
            if body is not None:
                turns = open_turns(body, path, self._manifest)
                if turns.body is not body:
                    raw = encode(turns.body)
                    scope = {**scope, "headers": with_length(scope["headers"], len(raw))}
        except RequestError as error:
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, replay_body(raw, receive), send)

    async def _count(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(send, path)
        try:
            if path == SCORE:  # it reads its body itself
                await self._app(scope, receive, answer)
            else:
                await self._steer(path, scope, receive, answer)
        finally:
            metrics.count_request(path, answer.status)

    async def _steer(self, path: str, scope: Scope, receive: Receive, send: Answer) -> None:
        received = now() if self._trace is not None else None
        try:
            caller = caller_of(scope, self._callers)
            raw = await read_body(receive, self._settings.max_body_bytes)
            body = scope[BODY] if BODY in scope else parse_body(raw)
            if body is None:
                await self._app(scope, replay_body(raw, receive), send)
                return
            body = with_header_dials(body, Headers(scope=scope))
            options = parse_options(body[FIELD]) if FIELD in body else RefusalOptions()
            policy = caller.policy(options.policy)
            changed, context = await aside(len(raw), self.prepare, body, path, options, policy)
            if changed is not body:
                raw = write_json(changed)
                scope = {**scope, "headers": with_length(scope["headers"], len(raw))}
        except RequestError as error:
            error.message = error.message.replace(self._guard.mark, "")
            await error_response(error)(scope, receive, send)
            return
        verdicts = Verdicts(self._manifest, context, choices_per_prompt=_choices_per_prompt(body))
        send.shape(
            context,
            Shaper(verdicts, echo=flag(body, "echo")),
            self._guard.mark.encode() if context.marked else b"",
        )
        token = DECISION_CONTEXT.set(context)
        try:
            await self._app(scope, replay_body(raw, receive), send)
        except RuntimeError as error:
            # What starlette makes of an error that it has an answer for, but no place any more.
            if error.__cause__ is None or not await send.end_failed():
                raise
        finally:
            DECISION_CONTEXT.reset(token)
            if self._trace is not None and received is not None:
                self._trace.add(Traced(received, caller.tenant, path, options, context))

    def prepare(
        self, body: dict[str, Any], path: str, options: RefusalOptions, policy: ActivePolicy
    ) -> tuple[dict[str, Any], DecisionContext]:
        """Takes our field out of a body and writes the history's control tokens into it.

        Args:
            body: The client's JSON object; not changed.
            path: The route that it was sent to.
            options: What our field says.
            policy: What the request follows.

        Returns:
            What vLLM is to read (the same object when nothing changed), and the context.

        Raises:
            RequestError: The ``refusal`` object, a history category or a combination of fields is
                wrong, or the policy does not allow it.
        """
        report = policy.reports(options)
        unread = {k: v for k, v in body.items() if k != FIELD} if FIELD in body else body
        opens_turn = not (path in RAW_PROMPTS or (path == INVOCATIONS and "prompt" in body))
        if not (opens_turn or policy.raw_prompts):
            raise NotAllowedError("the policy allows no raw prompts: send messages", param="prompt")
        guarded = self._guard.guarded(unread, refuse=policy.control_text == "refuse")
        turns = open_turns(guarded, path, self._manifest)
        if turns.continues and not policy.prefill:
            raise NotAllowedError(
                "the policy allows no prefill: end with another role's turn than the assistant's, "
                "and leave continue_final_message and an unfinished status out",
                param="input" if path == RESPONSES else "continue_final_message",
            )
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
            logprobs=self._settings.max_logprobs,
            piece_logprobs=self._settings.max_logprobs // 8,
            prompts=prompts_in(body),
            names_length=any(body.get(name) is not None for name in LENGTHS),
        )
        if context.beam_search and _is_batch(body.get("prompt")):
            raise RequestError(
                "use_beam_search takes one prompt a request", param="prompt", status=400
            )
        return turns.body, context


def _choices_per_prompt(body: dict[str, Any]) -> int:
    if "n" not in body:
        return 1
    try:
        return max(1, _INT.validate_python(body["n"]))
    except ValidationError:
        return 1


def _is_batch(prompt: Any) -> bool:
    return isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
