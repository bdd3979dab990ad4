"""The engine seam: vLLM's ``AsyncLLM`` with a decision before every answer, and its server.

Every route of vLLM's server that generates calls ``AsyncLLM.generate()``; here it is overridden.
This module and server/steering.py are the only ones that import vllm.
"""

import gc
import os
import secrets
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvloop
from fastapi.exceptions import RequestValidationError
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from vllm import envs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.openai.chat_completion.protocol import (
    BatchChatCompletionRequest,
    ChatCompletionRequest,
)
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.exceptions import (
    GracefulHTTPError,
    VLLMClientError,
    VLLMError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.logger import configure_logging_from_args
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import Executor

from models.checkpoint import opening_ids, turn_opening_ids
from models.errors import ConfigError, RequestError
from models.hashes import checkpoint_hashes
from models.manifest import Manifest
from models.tokens import single_id
from server.context import DECISION_CONTEXT, TURN_IDS_KEY, Decision, DecisionContext
from server.dials.board import Resolution
from server.flags import refuse_switched_on, refuse_unserved
from server.generation.call import decision_of, outputs_of
from server.generation.grammars import BOUNDED_BACKEND, LIMIT_KEY, check_dictation, check_grammar
from server.generation.margins import MarginBoard
from server.generation.outputs import Hider, merged
from server.generation.prompts import token_prompt
from server.generation.seam import Call, Outputs
from server.huge_pages import collapse_memory
from server.page.files import build_page_router
from server.policies.reloading import Policies
from server.settings import Settings
from server.telemetry.client_mistakes import drop_client_mistakes
from server.telemetry.recorder import MarginRecorder
from server.telemetry.trace import DecisionTrace
from server.web.connection import connection_options
from server.web.errors import Failure, failure, failure_of
from server.web.guard import Guard, build_guard
from server.web.middleware import GENERATING, RefusalMiddleware
from server.web.routes import build_router
from server.web.score import ScoreRoute, build_score_router
from server.web.validation import (
    answer_failed,
    answer_invalid,
    first_problem,
    stop_at_first_error,
)

CPU_KVCACHE_GIB = "2"
YOUNG_OBJECTS = 20_000
# The bodies of the routes that tenants may send to.
_REQUESTS = (
    ChatCompletionRequest,
    BatchChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
    AnthropicMessagesRequest,
    AnthropicCountTokensRequest,
)


class SteeredLLM(AsyncLLM):
    """An ``AsyncLLM`` whose every answer opens with a decision that the caller never sees."""

    manifest: Manifest
    unsteered: Callable[[], Resolution]
    recorder: MarginRecorder | None

    def steer(
        self,
        manifest: Manifest,
        unsteered: Callable[[], Resolution],
        mark: str,
        max_grammar_bytes: int,
        max_grammar_count: int,
        recorder: MarginRecorder | None = None,
    ) -> None:
        """Tells the engine its control tokens, before the first request.

        Args:
            manifest: The checkpoint's.
            unsteered: Gives the dials of calls that come from no HTTP request.
            mark: What the guard breaks special tokens with.
            max_grammar_bytes: Longest grammar of a request, as text.
            max_grammar_count: What its counts may come to.
            recorder: Counts the margins of a share of the requests.
        """
        self.manifest = manifest
        self.unsteered = unsteered
        self.max_grammar_bytes = max_grammar_bytes
        self.max_grammar_count = max_grammar_count
        self.recorder = recorder
        self.hider = Hider(manifest, mark)
        self.category_of = {c.id: i for i, c in enumerate(manifest.categories)}
        self.margin_board = MarginBoard(len(manifest.categories))
        # V1 gives a request's `logprob_token_ids` to its whole batch: tests/server/test_sampler.py
        self.margins_by_logprobs = self.vllm_config.use_v2_model_runner
        defaults = self.vllm_config.model_config.get_diff_sampling_param()
        self.repetition_penalty = float(defaults.get("repetition_penalty", 1.0))
        tokenizer: Any = self.renderer.get_tokenizer()
        self.opening = opening_ids(tokenizer)
        told: Any = self.vllm_config.additional_config
        self.turn_ids = frozenset(told[TURN_IDS_KEY])
        self.mark_id = single_id(tokenizer, mark)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> Outputs:
        """Decides, then answers or refuses. Arguments and outputs are those of ``AsyncLLM``.

        The control token is neither in the outputs' text nor in their ids, log-probabilities or
        counts; the decision is recorded in the request's ``DecisionContext``.

        Raises:
            GracefulHTTPError: The policy allows no grammars.
            VLLMUnprocessableEntityError: The request asks an adapter for a rate.
            VLLMValidationError: ``logprob_token_ids`` would reach others' answers, or the grammar
                is too long. While iterating: the prompt holds control tokens that the server did
                not put there, or the sampling parameters touch them.
        """
        if sampling_params.logprob_token_ids and not self.margins_by_logprobs:
            raise VLLMValidationError(
                "logprob_token_ids: vLLM's V1 model runner would give these tokens to every "
                "request of its batch in place of their own; ask for top_logprobs",
                parameter="logprob_token_ids",
            )
        context = DECISION_CONTEXT.get() or DecisionContext(self.unsteered())
        try:
            self._admit(context, sampling_params, adapted=bool(options.get("lora_request")))
        except RequestError as error:
            context.failure = failure_of(error)
            raise self.vllm_error(error) from error
        number = context.next_call()
        context.request_ids.append(request_id)
        return outputs_of(Call(self, context, number, sampling_params, request_id, options), prompt)

    async def decide(
        self, prompt: Any, context: DecisionContext, temperature: float, lora_request: Any = None
    ) -> Decision:
        """Returns the decision on one prompt, margins included where the context reports.

        Raises:
            RequestError: The prompt is too long or holds control tokens of the client's, or an
                adapter is asked for a rate.
        """
        if lora_request is not None:
            context.adapt()
        params = SamplingParams(temperature=temperature, max_tokens=1)
        request_id = f"score-{secrets.token_hex(16)}"
        call = Call(self, context, 0, params, request_id, {"lora_request": lora_request})
        return await decision_of(call, prompt)

    def generate_stock(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> Outputs:
        """Is ``AsyncLLM.generate``, without any decision of ours."""
        return super().generate(prompt, sampling_params, request_id, **options)

    def decision_params(
        self, params: SamplingParams, *, choices: int, margins: bool
    ) -> SamplingParams:
        """Returns the parameters of a decision pass; see server/generation/seam.py."""
        return SamplingParams(
            n=choices,
            temperature=params.temperature,
            seed=params.seed,
            max_tokens=1,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            logprob_token_ids=self.manifest.control_ids if margins else None,
        )

    def merge(self, streams: Sequence[Outputs], params: SamplingParams) -> Outputs:
        """Merges the streams of a request's choices; see server/generation/seam.py."""
        delta = params.output_kind is RequestOutputKind.DELTA
        return merged(merge_async_iterators(*streams), len(streams), delta=delta)

    def _admit(self, context: DecisionContext, params: SamplingParams, *, adapted: bool) -> None:
        if adapted:
            context.adapt()
        if not context.grammars:
            check_dictation(params)
        if params.structured_outputs is not None:
            check_grammar(
                params.structured_outputs,
                allowed=context.grammars,
                most_bytes=self.max_grammar_bytes,
                most_count=self.max_grammar_count,
                choices=context.prompts * params.n,
            )

    def vllm_error(self, error: RequestError) -> VLLMError:
        """Returns vLLM's error for one of ours; see server/generation/seam.py."""
        if error.status == HTTPStatus.FORBIDDEN:
            return GracefulHTTPError(error.message, HTTPStatus.FORBIDDEN)
        kind = VLLMValidationError if error.status == 400 else VLLMUnprocessableEntityError
        return kind(error.message, parameter=error.param)

    def failure(self, error: Exception) -> Failure:
        """Returns what the client is told of an error of vLLM's; see server/generation/seam.py."""
        return _failure(create_error_response(error))


def parse_flags(arguments: Sequence[str]) -> Namespace:
    """Parses vLLM's own server flags.

    Args:
        arguments: As on the command line, ``--model`` included.

    Raises:
        ConfigError: A flag or variable would be ignored here, or would lead around what was
            verified.
    """
    cli_env_setup()  # type: ignore[no-untyped-call]
    parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    args: Namespace = parser.parse_args(list(arguments))
    refuse_unserved(args, parser.get_default)
    refuse_switched_on(lambda name: getattr(envs, name))
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if args.gpu_memory_utilization == parser.get_default("gpu_memory_utilization"):
        _bound_cpu_cache()
    _prefill_whole(args)
    _bound_grammars(args)
    return args


def _prefill_whole(args: Namespace) -> None:
    # vLLM 0.32 rewinds the generator of a seeded request whose prefill is cut in two, and a CPU's
    # generators cannot be rewound: the engine would end, and with it every client's requests.
    if not current_platform.is_cpu():
        return
    if args.enable_chunked_prefill:
        raise ConfigError(
            "--enable-chunked-prefill: on a CPU a request with a seed would end vLLM's engine"
        )
    args.enable_chunked_prefill = False


def _bound_grammars(args: Namespace) -> None:
    # xgrammar, vLLM's first choice, may stand still for minutes in one step of a regex of 20
    # characters. This one ends what takes too long, and leaves out the same properties. It does not
    # know the tags that vLLM would make of a forced call: then it gets the tools' JSON schemas.
    wanted = args.structured_outputs_config
    if wanted.backend in ("auto", BOUNDED_BACKEND):
        wanted.backend = BOUNDED_BACKEND
        wanted.disable_additional_properties = True
        os.environ.setdefault("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0")


def _bound_cpu_cache() -> None:
    # vLLM would take 92 % of the machine's memory, and not start where so much is not free.
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KVCACHE_GIB)


class _VllmScorer:
    """Renders score inputs as vLLM's own routes do, so that ids and decisions are theirs.

    Args:
        engine: Decides.
        state: The app's, where vLLM keeps its handlers.
        temperature: Of the decisions under ``sample``.
    """

    def __init__(self, engine: SteeredLLM, state: Any, temperature: float) -> None:
        self._engine = engine
        self._chat = state.openai_serving_chat
        self._completion = state.openai_serving_completion
        self._temperature = temperature

    async def render(self, model: str | None, body: dict[str, Any]) -> tuple[Any, Any]:
        """Returns the rendered prompt and the adapter that ``model`` names, if any."""
        try:
            request, rendered = await self._rendered(model, body)
            lora_request = self._chat._maybe_get_adapters(request)
        except ValidationError as error:
            raise first_problem(error.errors(), body) from error
        except (VLLMClientError, ValueError, TypeError, TemplateError) as error:
            raise _request_error(create_error_response(error)) from error
        if isinstance(rendered, ErrorResponse):
            raise _request_error(rendered)
        return rendered[0], lora_request

    def tokens(self, rendered: tuple[Any, Any]) -> int:
        """Returns the length of what ``render`` returned."""
        return len(token_prompt(rendered[0])["prompt_token_ids"])

    async def decide(self, rendered: tuple[Any, Any], context: DecisionContext) -> Decision:
        """Returns the decision on what ``render`` returned."""
        prompt, lora_request = rendered
        try:
            return await self._engine.decide(prompt, context, self._temperature, lora_request)
        except (VLLMClientError, ValueError) as error:
            raise _request_error(create_error_response(error)) from error

    async def _rendered(self, model: str | None, body: dict[str, Any]) -> tuple[Any, Any]:
        if "prompt" in body:
            text = CompletionRequest.model_validate({"model": model, **body})
            return text, await self._completion.render_completion_request(text)
        chat = ChatCompletionRequest.model_validate({"model": model, **body})
        answer = await self._chat.render_chat_request(chat)
        return chat, answer if isinstance(answer, ErrorResponse) else answer[1]


def _request_error(response: ErrorResponse) -> RequestError:
    told = _failure(response)
    return RequestError(told.message, param=told.param, status=told.status, code=told.code)


def _failure(response: ErrorResponse) -> Failure:
    error = response.error
    return failure(error.code, error.message, error.param)


def serve(args: Namespace, manifest: Manifest, settings: Settings, policies: Policies) -> None:
    """Starts the engine and answers HTTP until SIGTERM or SIGINT, on vLLM's own event loop.

    Args:
        args: What ``parse_flags`` returned.
        manifest: The checkpoint's, already verified.
        settings: The operator's settings.
        policies: What requests follow.
    """
    uvloop.run(_serve(args, manifest, settings, policies))


async def _serve(
    args: Namespace, manifest: Manifest, settings: Settings, policies: Policies
) -> None:
    try:
        _, sock = setup_server(args, reuse_port=False)
    except OSError as error:
        raise ConfigError(f"--port {args.port}: {error.strerror}") from error
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER
    )
    policies.fit(api_keys=_api_keys(args))
    recorder = _open_recorder(Path(args.model), manifest, settings)
    trace = _open_trace(manifest, settings)
    interface = "SteeringV2" if config.use_v2_model_runner else "SteeringV1"
    config.model_config.logits_processors = [f"server.steering:{interface}"]
    tokenizer: Any = cached_tokenizer_from_config(config.model_config)
    config.additional_config = {
        **config.additional_config,
        LIMIT_KEY: settings.max_grammar_s,
        TURN_IDS_KEY: _turn_ids(config, tokenizer),
    }
    _price_grammars(config)
    # Before the engine is made: its renderer encodes with copies of this tokenizer.
    guard = build_guard(tokenizer, manifest, config.model_config.max_model_len)
    engine = SteeredLLM(
        config,
        executor_class=Executor.get_class(config),
        log_stats=not args.disable_log_stats,
        log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        usage_context=UsageContext.OPENAI_API_SERVER,
    )
    try:
        engine.steer(
            manifest,
            policies.strictest,
            guard.mark,
            settings.max_grammar_bytes,
            settings.max_grammar_count,
            recorder,
        )
        await engine.reset_mm_cache()
        async with AsyncExitStack() as running:
            if recorder:
                await running.enter_async_context(recorder.flushing())
            if trace:
                await running.enter_async_context(trace.writing())
            await running.enter_async_context(policies.watching())
            shutdown = await _serve_http(engine, args, sock, settings, policies, guard, trace)
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
        engine.margin_board.close()
    try:
        await shutdown
    finally:
        sock.close()


def _price_grammars(config: Any) -> None:
    kind = "Async" if config.scheduler_config.async_scheduling else ""
    config.scheduler_config.scheduler_cls = f"server.steering.Steered{kind}Scheduler"


def _turn_ids(config: Any, tokenizer: Any) -> list[int]:
    # What ends an answer is never masked, whatever it opens.
    model = config.model_config
    ends: set[int | None] = set()
    for told in (
        model.try_get_generation_config().get("eos_token_id"),
        getattr(model.hf_text_config, "eos_token_id", None),
    ):
        ends.update(told if isinstance(told, list) else [told])
    return sorted(turn_opening_ids(tokenizer) - ends)


def put_layer(app: Any, layer: Middleware) -> None:
    """Puts our layer among vLLM's middleware."""
    # vLLM's own check would want its key on the operator's routes too, and leaves /invocations out.
    # What adds headers to answers stands outside, so that pages can read our errors as well. All
    # others of vLLM's, and those of --middleware, see admitted requests only.
    theirs = [m for m in app.user_middleware if m.cls is not AuthenticationMiddleware]
    outside = [m for m in theirs if m.cls in (CORSMiddleware, XRequestIdMiddleware)]
    inside = [m for m in theirs if m not in outside]
    app.user_middleware[:] = [*outside, layer, *inside]


def _make_quick(app: Any) -> None:
    # The router, and the middleware that labels vLLM's HTTP metrics, try one route after the other;
    # vLLM reads variables of the environment several times a request; and the collector looks for
    # cycles after so few new objects that most of them are requests still being answered. What was
    # made by now stays for good.
    app.router.routes.sort(key=lambda route: getattr(route, "path", None) not in GENERATING)
    envs.enable_envs_cache()
    gc.set_threshold(YOUNG_OBJECTS)
    collapse_memory()


def _api_keys(args: Namespace) -> list[str]:
    # As vLLM's own authentication reads them.
    return [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]


def _default_temperature(config: Any) -> float:
    # Where generation_config.json names none, vLLM's routes take OpenAI's.
    return float(config.get_diff_sampling_param().get("temperature", 1.0))


def _open_trace(manifest: Manifest, settings: Settings) -> DecisionTrace | None:
    if settings.trace_file is None:
        return None
    fields = {name for model in _REQUESTS for name in model.model_fields}
    return DecisionTrace(settings.trace_file, manifest.names, fields)


def _open_recorder(
    directory: Path, manifest: Manifest, settings: Settings
) -> MarginRecorder | None:
    if settings.record_file is None:
        return None
    weights = checkpoint_hashes(directory).weights
    return MarginRecorder(settings.record_file, settings.record_share, manifest.names, weights)


async def _serve_http(
    engine: SteeredLLM,
    args: Namespace,
    sock: Any,
    settings: Settings,
    policies: Policies,
    guard: Guard,
    trace: DecisionTrace | None,
) -> Any:
    manifest = engine.manifest
    tasks = await engine.get_supported_tasks()
    stop_at_first_error(*_REQUESTS)
    app = build_app(args, tasks, engine.model_config)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    app.add_exception_handler(Exception, answer_failed)
    if not args.log_error_stack:
        drop_client_mistakes((VLLMClientError, ValidationError, TemplateError, ErrorResponse))
    directory = Path(args.model)
    app.include_router(
        build_router(
            manifest,
            engine,
            policies.served.calibrations,
            lambda: checkpoint_hashes(directory),
        )
    )
    if settings.page:
        app.include_router(build_page_router())
    put_layer(
        app,
        Middleware(
            RefusalMiddleware,
            manifest=manifest,
            settings=settings,
            callers=policies,
            guard=guard,
            trace=trace,
        ),
    )
    app.middleware_stack = None  # build_app has built it already; the next call builds it anew
    await init_app_state(engine, app.state, args, tasks)
    scorer = _VllmScorer(engine, app.state, _default_temperature(engine.model_config))
    route = ScoreRoute(manifest, scorer, guard, trace)
    app.include_router(build_score_router(route))
    _make_quick(app)
    uvicorn_options = connection_options(settings)
    if (log_config := get_uvicorn_log_config(args)) is not None:
        uvicorn_options["log_config"] = log_config
    return await serve_http(
        app,
        sock=sock,
        enable_ssl_refresh=args.enable_ssl_refresh,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        **uvicorn_options,
    )
