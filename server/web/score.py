"""``POST /v1/refusal/score``: the decisions of many prompts, one token of work each, no text."""

import asyncio
import copy
import math
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import model_validator as validates_model
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from models.errors import RequestError
from models.manifest import Manifest
from server.apis.chat import annotate
from server.context import BODY, CALLER, Decision, DecisionContext
from server.dials.board import Resolution
from server.dials.protocol import FIELD, RefusalOptions, check_refusal_in, parse_options
from server.dials.reports import build_report
from server.policies.book import ActivePolicy, Caller
from server.policies.credentials import now
from server.telemetry import metrics
from server.telemetry.trace import DecisionTrace, Scored
from server.web.bodies import CLIENT_GONE, encode, with_header_dials
from server.web.errors import error_response
from server.web.guard import Guard
from server.web.validation import NOT_JSON, first_problem

SCORE = "/v1/refusal/score"
MOST_INPUTS = 1024
# So many are rendered, and so many decided, before other requests have their turn: rendering holds
# the event loop, and what waits in the engine's queue stands before whatever comes next.
AT_ONCE = 16
# So many tokens, too, unless one prompt has more: about what the engine takes into one step.
TOKENS_AT_ONCE = 2048


T = TypeVar("T")


class ScoreInput(BaseModel):
    """One prompt: messages, as the chat route takes them, or the text of a raw prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: Annotated[list[Any], Field(min_length=1)] | None = None
    prompt: str | None = None

    @validates_model(mode="after")
    def _is_one_of_both(self) -> "ScoreInput":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("an input holds either messages or a prompt")
        return self


def _options(value: Any) -> RefusalOptions:
    return value if isinstance(value, RefusalOptions) else parse_options(value)


class ScoreRequest(BaseModel):
    """The body of a score request.

    Attributes:
        model: As in vLLM's routes; the served checkpoint where it is missing.
        inputs: What to decide.
        refusal: The dials, as in every other request.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    inputs: Annotated[list[ScoreInput], Field(min_length=1, max_length=MOST_INPUTS)]
    refusal: Annotated[RefusalOptions, BeforeValidator(_options)] = RefusalOptions()


class Scorer(Protocol):
    """What this route needs of the engine."""

    async def render(self, model: str | None, body: dict[str, Any]) -> Any:
        """Returns what vLLM's own route would send to its engine for that body.

        Raises:
            RequestError: vLLM refuses it.
        """

    def tokens(self, rendered: Any) -> int:
        """Returns the length of a rendered prompt."""

    async def decide(self, rendered: Any, context: DecisionContext) -> Decision:
        """Returns the decision on a rendered prompt, margins included.

        Raises:
            RequestError: The prompt is too long or holds control tokens of the client's.
        """


def parse_score(body: Any) -> ScoreRequest:
    """Validates a body.

    Raises:
        RequestError: With the path of the field that is wrong.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", status=400)
    try:
        wanted = ScoreRequest.model_validate(body)
    except ValidationError as error:
        problem = first_problem(error.errors(), body)
        if any(one["type"] == "too_long" for one in error.errors()):
            problem.status = HTTPStatus.UNPROCESSABLE_ENTITY
        raise problem from error
    check_refusal_in(wanted.refusal)
    if wanted.refusal.report is False:
        raise RequestError(f"{FIELD}.report: scores are reports", param=f"{FIELD}.report")
    return wanted


class ScoreRoute:
    """Answers score requests.

    Args:
        manifest: The served checkpoint's.
        scorer: Renders and decides.
        guard: Keeps text from being read as special tokens.
        trace: Gets a line of each request.
    """

    def __init__(
        self,
        manifest: Manifest,
        scorer: Scorer,
        guard: Guard,
        trace: DecisionTrace | None = None,
    ) -> None:
        self._trace = trace
        self._manifest = manifest
        self._scorer = scorer
        self._guard = guard

    async def __call__(self, request: Request) -> Response:
        """Answers one request; a client that goes takes its prompts out of the engine."""
        received = now()
        caller: Caller = request.scope[CALLER]
        try:
            _check_media_type(request.headers.get("content-type", ""))
            body = request.scope[BODY]
            wanted = parse_score(body and with_header_dials(body, request.headers))
            policy = caller.policy(wanted.refusal.policy)
            policy.reports(wanted.refusal.model_copy(update={"report": True}))
            dials = policy.board.resolve(wanted.refusal, explain=True)
            answer = await _unless_gone(request.receive, self._score(wanted, policy, dials))
        except RequestError as error:
            error.message = error.message.replace(self._guard.mark, "")  # vLLM may quote the input
            return error_response(error)
        if answer is None:
            return Response(status_code=CLIENT_GONE)
        if self._trace is not None:
            refused = sum(entry["refused"] for entry in answer["data"])
            told = (received, caller.tenant, SCORE, policy.name, wanted.refusal, dials)
            self._trace.add(Scored(*told, len(wanted.inputs), refused))
        return Response(encode(answer), media_type="application/json")

    async def _score(
        self, wanted: ScoreRequest, policy: ActivePolicy, dials: Resolution
    ) -> dict[str, Any]:
        prepared = await asyncio.to_thread(self._prepare_all, wanted.inputs, policy)
        # All are rendered before one is decided: a wrong input costs the engine nothing.
        rendered: list[Any] = []
        for start in range(0, len(prepared), AT_ONCE):
            some = prepared[start : start + AT_ONCE]
            work = [self._scorer.render(wanted.model, body) for body, _ in some]
            rendered += await _each(work, first=start)
        decisions: list[Decision] = []
        for part in _parts([self._scorer.tokens(prompt) for prompt in rendered]):
            work = [
                self._scorer.decide(prompt, _context(policy, dials, body, count))
                for prompt, (body, count) in zip(rendered[part], prepared[part], strict=True)
            ]
            decisions += await _each(work, first=part.start)
        metrics.child(metrics.SCORED).inc(len(decisions))
        return await asyncio.to_thread(self._answer, wanted.model, dials, decisions)

    def _prepare_all(
        self, inputs: Sequence[ScoreInput], policy: ActivePolicy
    ) -> list[tuple[dict[str, Any], int]]:
        return [self._prepare(place, entry, policy) for place, entry in enumerate(inputs)]

    def _prepare(
        self, place: int, entry: ScoreInput, policy: ActivePolicy
    ) -> tuple[dict[str, Any], int]:
        try:
            refuse = policy.control_text == "refuse"
            if entry.messages is None:
                policy.check_raw_prompts()
                return self._guard.guarded({"prompt": entry.prompt}, refuse=refuse), 0
            body = self._guard.guarded({"messages": entry.messages}, refuse=refuse)
            messages, count = annotate(body["messages"], self._manifest)
        except RequestError as error:
            raise _at(place, error) from error
        return {"messages": messages}, count

    def _answer(
        self, model: str | None, dials: Resolution, decisions: list[Decision]
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {"object": "list", "model": model}
        answer["data"] = [self._entry(i, d, dials) for i, d in enumerate(decisions)]
        if dials.forecast is not None:
            # Once, not with every input: it is the same for all.
            expected = zip(self._manifest.names, dials.forecast.categories, strict=True)
            answer["calibration"] = dials.forecast.calibration
            answer["expected"] = {
                **dials.forecast.total,
                "categories": dict(expected),
            }
        return answer

    def _entry(self, index: int, decision: Decision, dials: Resolution) -> dict[str, Any]:
        assert decision.margins is not None
        names = self._manifest.names
        category = None if decision.category is None else names[decision.category]
        report = build_report(
            names,
            category,
            decision.margins,
            dials.controls,
            clamped=dict(dials.clamped),
            replaced_decision=dials.replaced_decision,
        )
        normaliser = decision.log_normaliser
        if normaliser is None or not math.isfinite(normaliser):  # JSON has no word for it
            normaliser = None
        return {"index": index, "log_normaliser": normaliser, **report}


def _check_media_type(sent: str) -> None:
    # As vLLM's own routes read it.
    if sent.lower().split(";", maxsplit=1)[0] != "application/json":
        raise RequestError(NOT_JSON, param="Content-Type", status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE)


def build_score_router(route: ScoreRoute) -> APIRouter:
    """Builds the router of the score route, with its body in the OpenAPI document."""
    router = APIRouter()
    content = {"application/json": {"schema": _inlined(ScoreRequest.model_json_schema())}}

    @router.post(SCORE, openapi_extra={"requestBody": {"required": True, "content": content}})
    async def score(request: Request) -> Response:
        """Returns each category's probability and margin for up to 1024 prompts."""
        return await route(request)

    return router


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    # In an OpenAPI document a reference starts at the document's root.
    definitions = schema.pop("$defs", {})

    def replaced(node: Any) -> Any:
        if isinstance(node, list):
            return [replaced(entry) for entry in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return replaced(definitions[node["$ref"].rpartition("/")[2]])
        return {key: replaced(value) for key, value in node.items()}

    inlined: dict[str, Any] = replaced(schema)
    return inlined


def _parts(lengths: Sequence[int]) -> Iterator[slice]:
    start, tokens = 0, 0
    for place, length in enumerate(lengths):
        full = place - start == AT_ONCE or tokens + length > TOKENS_AT_ONCE
        if full and place > start:
            yield slice(start, place)
            start, tokens = place, 0
        tokens += length
    yield slice(start, len(lengths))


async def _each(work: Sequence[Awaitable[T]], *, first: int = 0) -> list[T]:
    # Every one is waited for, so that the error is that of the first wrong input, not of the
    # fastest.
    done: list[T] = []
    for place, result in enumerate(await asyncio.gather(*work, return_exceptions=True), first):
        if isinstance(result, RequestError):
            raise _at(place, result)
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


def _context(
    policy: ActivePolicy, dials: Resolution, body: dict[str, Any], history: int
) -> DecisionContext:
    return DecisionContext(
        dials,
        report=True,
        history=(history,),
        opens_turn="messages" in body,
        grammars=policy.grammars,
        has_floor=policy.board.bounds.has_floor,
    )


def _at(place: int, error: RequestError) -> RequestError:
    path = f"inputs.{place}"
    placed = copy.copy(error)
    placed.param = f"{path}.{error.param}" if error.param else path
    placed.message = f"{path}: {error.message}"
    return placed


async def _unless_gone(
    receive: Receive, work: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any] | None:
    answer = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        gone.cancel()
        answer.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
