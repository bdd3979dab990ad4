"""The engine seam: vLLM's ``AsyncLLM`` with a decision before every answer, and its server.

Every route of vLLM's server that generates calls ``AsyncLLM.generate()``; here it is overridden.
This module and server/steering.py are the only ones that import vllm.
"""

import asyncio
import secrets
from argparse import Namespace
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvloop
from fastapi import FastAPI
from jinja2 import TemplateError
from pydantic import ValidationError
from starlette.middleware.cors import CORSMiddleware
from vllm import __version__ as VLLM_VERSION
from vllm import envs
from vllm.config import VllmConfig
from vllm.entrypoints.anthropic.protocol import (
    AnthropicCountTokensRequest,
    AnthropicMessagesRequest,
)
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http
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
from vllm.exceptions import (
    GracefulHTTPError,
    VLLMClientError,
    VLLMError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.logger import configure_logging_from_args
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor
from vllm.v1.metrics.prometheus import get_prometheus_registry

from models.checkpoint import opening_ids
from models.errors import RequestError, UnavailableError
from models.hashes import checkpoint_hashes
from models.manifest import Manifest
from models.tokens import single_id
from server import flags, vllm_names
from server.app import (
    Service,
    add_scores,
    http_options,
    make_quick,
    open_recorder,
    open_trace,
    put_layer,
    surround,
)
from server.context import DECISION_CONTEXT, TURN_IDS_KEY, Decision, DecisionContext
from server.dials.board import Resolution
from server.generation.call import admit, decision_of, outputs_of
from server.generation.margins import MarginBoard
from server.generation.outputs import Hider, merged
from server.generation.parameters import MOST_BAD_WORD_TOKENS
from server.generation.scoring import Handlers, VllmScorer
from server.generation.seam import Call, Outputs, TextIds
from server.lifetime import DRAIN_S, RELEASE_S, serve_until_ended
from server.policies.reloading import Policies
from server.settings import Settings
from server.telemetry.client_mistakes import drop_client_mistakes
from server.telemetry.listener import MetricsApp, listening, metrics_route
from server.telemetry.recorder import MarginRecorder
from server.telemetry.running import name_server, observers, observing
from server.telemetry.spans import trace_headers
from server.web.admission import Admission, most_under_way
from server.web.errors import Failure, failure, failure_of
from server.web.guard import build_guard
from server.web.validation import adapt_bodies, stop_at_first_error
from server.workers.config import additional, answers_at_once, steer_workers
from server.workers.engines import engine_config, join
from server.workers.handshake import shake_hands
from server.workers.http_processes import listen, serve_together, share
from server.workers.shared import HttpProcess

# The bodies of the routes that tenants may send to.
_REQUESTS = (
    ChatCompletionRequest,
    BatchChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
    AnthropicMessagesRequest,
    AnthropicCountTokensRequest,
)
# vLLM's middleware that stays around our layer, so that pages can read our errors as well.
ADDS_HEADERS = (CORSMiddleware, XRequestIdMiddleware)
ENDED = "the engine ended before the answer was complete: send the request again"


class SteeredLLM(AsyncLLM):
    """An ``AsyncLLM`` whose every answer opens with a decision that the caller never sees."""

    client_error: type[Exception] = VLLMClientError

    def steer(
        self,
        manifest: Manifest,
        settings: Settings,
        mark: str,
        unsteered: Callable[[], Resolution],
        recorder: MarginRecorder | None = None,
    ) -> None:
        """Tells the engine its control tokens, before the first request.

        Args:
            manifest: The served checkpoint's.
            settings: The operator's.
            mark: Text of the token with which the guard breaks special tokens.
            unsteered: Returns the dials of calls that come from no HTTP request.
            recorder: Counts the margins of a share of the requests.
        """
        self.manifest = manifest
        self.settings = settings
        self.unsteered = unsteered
        self.recorder = recorder
        self.hider = Hider(manifest, mark)
        self.category_of = {c.id: i for i, c in enumerate(manifest.categories)}
        self.margin_board = MarginBoard(len(manifest.categories))
        # V1 gives a request's `logprob_token_ids` to its whole batch: tests/server/test_sampler.py
        self.margins_by_logprobs = self.vllm_config.use_v2_model_runner
        self.defaults = self.vllm_config.model_config.get_diff_sampling_param()
        self.repetition_penalty = float(self.defaults.get("repetition_penalty", 1.0))
        tokenizer: Any = self.renderer.get_tokenizer()
        self.opening = opening_ids(tokenizer)
        self.turn_ids = frozenset(additional(self.vllm_config)[TURN_IDS_KEY])
        self.mark_id = single_id(tokenizer, mark)
        self.bad_word_tokens = min(MOST_BAD_WORD_TOKENS, envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS)
        self.text_ids: TextIds = partial(tokenizer.encode, add_special_tokens=False)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> Outputs:
        """Decides, then answers or refuses. Arguments and outputs are those of ``AsyncLLM``.

        The outputs do not show the control token: not in text, ids, log-probabilities or counts.
        The request's ``DecisionContext`` records the decision.

        Raises:
            VLLMError: The request is not admitted; while iterating, also its prompt or parameters
                (see server/generation/call.py).
        """
        context = DECISION_CONTEXT.get() or DecisionContext(self.unsteered())
        adapted = bool(options.get("lora_request"))
        try:
            admit(self, context, sampling_params, self.settings, adapted=adapted)
        except RequestError as error:
            context.failure = failure_of(error)
            raise self.vllm_error(error) from error
        number = context.next_call()
        context.request_ids.append(request_id)
        return outputs_of(Call(self, context, number, sampling_params, request_id, options), prompt)

    async def decide(
        self, prompt: object, context: DecisionContext, lora_request: LoRARequest | None = None
    ) -> Decision:
        """Returns the decision on one prompt, margins included where the context reports.

        Raises:
            RequestError: The prompt is too long or holds control tokens of the client's, or an
                adapter is asked for a rate.
        """
        if lora_request is not None:
            context.adapt()
        # Under the rule `sample`; where generation_config.json has none, it is OpenAI's.
        temperature = float(self.defaults.get("temperature", 1.0))
        params = SamplingParams(temperature=temperature, max_tokens=1)
        request_id = f"score-{secrets.token_hex(16)}"
        call = Call(self, context, 0, params, request_id, {"lora_request": lora_request})
        try:
            return await decision_of(call, prompt)
        except EngineDeadError as error:
            raise UnavailableError(ENDED) from error

    async def fail_all(self) -> None:
        """Ends at once. What is in flight fails and is answered; in vLLM it would wait for ever."""
        await asyncio.to_thread(self.shutdown, timeout=0)
        self.output_processor.propagate_error(EngineDeadError())

    def generate_stock(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> Outputs:
        """Generates without any decision of ours; see server/generation/seam.py."""
        if self.observability_config.otlp_traces_endpoint is not None:
            options["trace_headers"] = trace_headers()
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

    def validate(self, params: SamplingParams) -> None:
        """Raises what vLLM would; see server/generation/seam.py."""
        self.input_processor._validate_params(params, ("generate",))
        copy(params).update_from_tokenizer(self.renderer.get_tokenizer())

    def merge(self, streams: Sequence[Outputs], params: SamplingParams) -> Outputs:
        """Merges the streams of a request's choices; see server/generation/seam.py."""
        delta = params.output_kind is RequestOutputKind.DELTA
        return merged(merge_async_iterators(*streams), len(streams), delta=delta)

    def vllm_error(self, error: RequestError) -> VLLMError:
        """Returns vLLM's error for one of ours; see server/generation/seam.py."""
        if error.status == HTTPStatus.FORBIDDEN:
            return GracefulHTTPError(error.message, HTTPStatus.FORBIDDEN)
        kind = VLLMValidationError if error.status == 400 else VLLMUnprocessableEntityError
        return kind(error.message, parameter=error.param)

    def failure(self, error: Exception | ErrorResponse) -> Failure:
        """Returns what vLLM's routes answer to an error; see server/generation/seam.py."""
        if isinstance(error, EngineDeadError):
            return failure_of(UnavailableError(ENDED))
        answer = error if isinstance(error, ErrorResponse) else create_error_response(error)
        return failure(answer.error.code, answer.error.message, answer.error.param)


def parse_flags(arguments: Sequence[str]) -> Namespace:
    """Parses vLLM's own server flags, as on the command line, ``--model`` included.

    Raises:
        ConfigError: This server would ignore a flag or variable, or it would bypass what was
            verified.
    """
    vllm_names.cli_env_setup()
    parser = vllm_names.make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    parser.set_defaults(shutdown_timeout=DRAIN_S)
    args: Namespace = parser.parse_args(list(arguments))
    flags.refuse_unserved(args, parser.get_default)
    flags.refuse_switched_on(lambda name: getattr(envs, name))
    configure_logging_from_args(args)
    vllm_names.validate_parsed_serve_args(args)
    if current_platform.is_cpu():
        flags.fit_to_cpu(args, parser.get_default, fast_bfloat16=flags.has_fast_bfloat16())
    flags.bound_grammars(args)
    return args


def serve(args: Namespace, manifest: Manifest, settings: Settings, policies: Policies) -> None:
    """Starts the engine and answers HTTP until SIGTERM or SIGINT, on vLLM's own event loop.

    Args:
        args: Returned by ``parse_flags``.
        manifest: The checkpoint's, already verified.
        settings: The operator's.
        policies: The policies in force.
    """
    if args.headless:
        join(args, settings)
        return
    process = listen(args, settings)
    run = partial(_serve, manifest, settings, policies)
    if args.api_server_count in (None, 1):
        uvloop.run(run(args, process))
        return
    config = engine_config(args, -1)
    steer_workers(config, settings, cached_tokenizer_from_config(config.model_config))
    most = most_under_way(answers_at_once(config), settings.max_waiting)
    serve_together(config, Executor.get_class(config), args, share(process, most), run)


async def _serve(
    manifest: Manifest,
    settings: Settings,
    policies: Policies,
    args: Namespace,
    process: HttpProcess,
) -> None:
    config = engine_config(args, process.index)
    model_name: Any = config.model_config.served_model_name
    name_server(model_name, VLLM_VERSION, policies.served)
    # As vLLM's own authentication reads them.
    policies.fit(api_keys=[key for key in (args.api_key or [envs.VLLM_API_KEY]) if key])
    recorder = open_recorder(Path(args.model), manifest, settings, process.lock)
    tokenizer: Any = cached_tokenizer_from_config(config.model_config)
    steer_workers(config, settings, tokenizer)
    service = Service(
        manifest,
        settings,
        policies,
        Admission(answers_at_once(config), settings.max_waiting, process.counts),
        # Before the engine is made: its renderer encodes with copies of this tokenizer.
        build_guard(tokenizer, manifest, config.model_config.max_model_len),
        open_trace(manifest, settings, _REQUESTS, process.lock),
        observers(
            manifest,
            model_name,
            spans=config.observability_config.otlp_traces_endpoint is not None,
            json=args.logging_config.formatter == "json",
        ),
        metrics_route(get_prometheus_registry()),
    )
    engine = _engine(config, args, process)
    try:
        engine.steer(manifest, settings, service.guard.mark, policies.strictest, recorder)
        await shake_hands(engine.engine_core.call_utility_all_async, config)
        await engine.reset_mm_cache()
        first = {"type": "token", "prompt_token_ids": engine.opening or [0]}
        await engine.decide(first, DecisionContext(policies.strictest()))
        app = await _app(engine, args, service)
        async with (
            observing(
                engine, settings, policies, service.trace, recorder, tests=process.index == 0
            ),
            policies.watching(),
            listening(MetricsApp(app, service.metrics), process.scraped, settings),
        ):
            options = http_options(args, settings, get_uvicorn_log_config(args))
            serving = serve_http(app, sock=process.sock, peer_loads=process.loads, **options)
            drain_s = args.shutdown_timeout
            await serve_until_ended(serving, app, engine, service.admission, drain_s)
    finally:
        engine.shutdown(timeout=RELEASE_S)
        engine.margin_board.close()
        process.sock.close()


def _engine(config: VllmConfig, args: Namespace, process: HttpProcess) -> SteeredLLM:
    return SteeredLLM(
        config,
        executor_class=Executor.get_class(config),
        log_stats=not args.disable_log_stats,
        log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        usage_context=UsageContext.OPENAI_API_SERVER,
        client_addresses=process.engine,
        client_count=args.api_server_count or 1,
        client_index=process.index,
    )


async def _app(engine: SteeredLLM, args: Namespace, service: Service) -> FastAPI:
    tasks = await engine.get_supported_tasks()
    stop_at_first_error(*_REQUESTS)
    if not args.log_error_stack:
        drop_client_mistakes((VLLMClientError, ValidationError, TemplateError, ErrorResponse))
    app = build_app(args, tasks, engine.model_config)
    adapt_bodies(app, "/derender")  # which hold requests
    hashes = partial(checkpoint_hashes, Path(args.model))
    surround(app, service, engine, hashes)
    put_layer(
        app,
        service,
        # It would want its key on the operator's routes too, and leaves /invocations out.
        replaced=AuthenticationMiddleware,
        outside=ADDS_HEADERS,
    )
    await init_app_state(engine, app.state, args, tasks)
    handlers = Handlers(
        app.state.openai_serving_chat,
        ChatCompletionRequest,
        app.state.openai_serving_completion,
        CompletionRequest,
    )
    add_scores(app, service, VllmScorer(engine, handlers))
    make_quick(app)
    # vLLM reads variables of the environment several times a request.
    envs.enable_envs_cache()
    return app
