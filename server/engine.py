"""The engine seam: vLLM's ``AsyncLLM`` with a decision before every answer, and its server.

Every route of vLLM's server that generates calls ``AsyncLLM.generate()``; here it is overridden.
This module and server/steering.py are the only ones that import vllm.
"""

import copy
import os
import secrets
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import uvloop
from starlette.middleware import Middleware
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.exceptions import VLLMValidationError
from vllm.logger import configure_logging_from_args
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.async_utils import merge_async_iterators
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor import Executor

from models.checkpoint import opening_ids
from models.controls import EXTRA_ARGS_KEY, Controls, Rule
from models.errors import ConfigError
from models.manifest import Manifest
from server import metrics
from server.context import STEERING, Decision, Steering
from server.hiding import Hider, drop_first_token
from server.middleware import RefusalMiddleware
from server.routes import build_router
from server.settings import Settings

Outputs = AsyncGenerator[RequestOutput, None]

CPU_KVCACHE_GIB = "2"

UNSERVED_FLAGS = {
    "headless": "this is one HTTP server with its engine; run vLLM's own for engines without one",
    "grpc": "only HTTP is served",
    "api_server_count": "one HTTP process a server; put several servers behind the gateway",
    "tokenizer": "the control tokens are verified against the checkpoint's own tokenizer",
    "skip_tokenizer_init": "the control tokens are read and hidden with the tokenizer",
    "chat_template": "put it into the checkpoint as chat_template.jinja, where it is verified",
    "logits_processors": "the decision is the one logits processor here",
    "logprobs_mode": "a report reads the model's own margins from raw log-probabilities",
}


class SteeredLLM(AsyncLLM):
    """An ``AsyncLLM`` whose every answer opens with a decision that the caller never sees."""

    manifest: Manifest
    unsteered: Controls

    def steer(self, manifest: Manifest, defaults: Controls) -> None:
        """Tells the engine its control tokens, before the first request.

        Args:
            manifest: The checkpoint's.
            defaults: The controls of calls that come from no HTTP request.
        """
        self.manifest = manifest
        self.unsteered = defaults
        self.hider = Hider(manifest)
        self._category_of = {c.id: i for i, c in enumerate(manifest.categories)}
        # Adopted checkpoints hold their control tokens as ordinary ones, which the detokenizer
        # would print. The ids stay.
        tokenizer: Any = self.renderer.get_tokenizer()
        self._opening = opening_ids(tokenizer)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [t.token for t in manifest.control_tokens]},
            replace_extra_special_tokens=False,
        )

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> Outputs:
        """Decides, then answers or refuses. Arguments and outputs are those of ``AsyncLLM``.

        The control token is neither in the outputs' text nor in their ids, log-probabilities or
        counts; the decision is recorded in the request's ``Steering``.

        Raises:
            VLLMValidationError: While iterating: the prompt holds control tokens that the server
                did not put there, or the sampling parameters touch them.
        """
        steering = STEERING.get() or Steering(self.unsteered)
        call = steering.next_call()
        run = _Run(self, steering, call, sampling_params, request_id, options)
        return run.outputs(prompt)

    def generate_stock(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> Outputs:
        """Is ``AsyncLLM.generate``, without any decision of ours."""
        return super().generate(prompt, sampling_params, request_id, **options)


class _Run:
    """One call of ``generate()``."""

    def __init__(
        self,
        engine: SteeredLLM,
        steering: Steering,
        call: int,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> None:
        self.engine = engine
        self.steering = steering
        self.call = call
        self.params = params
        self.request_id = request_id
        self.options = options
        self.started_s = time.monotonic()

    async def outputs(self, prompt: Any) -> Outputs:
        ids = _prompt_ids(prompt)
        beams = self.steering.beam_search
        if beams and self.steering.continues:
            raise VLLMValidationError("use_beam_search cannot continue a message")
        self._check_length(ids)
        self._check_prompt(ids, self.steering.history_of(0 if beams else self.call))
        _check_params(self.params, self.engine.hider.control_ids)
        if beams:
            stream = self._beam(prompt, ids)
        elif self._needs_decision_first():
            stream = self._decide_first(prompt, ids)
        else:
            stream = self._in_one_pass(prompt)
        hider = self.engine.hider
        visible = hider.visible(ids)
        async with aclosing(stream):
            async for output in stream:
                hider.hide(output, visible)
                self._note_refusals(output)
                yield output

    def _check_length(self, ids: list[int]) -> None:
        longest = self.engine.model_config.max_model_len - 2
        if len(ids) > longest and self.call == 0:
            raise VLLMValidationError(
                f"the prompt has {len(ids)} tokens and may have {longest}: the decision and the "
                "first token of the answer need a place each",
                parameter="messages",
            )

    def _check_prompt(self, ids: list[int], allowed: int) -> None:
        controls, opening = self.engine.hider.control_ids, self.engine._opening
        if controls.isdisjoint(ids):
            return
        places = [place for place, token in enumerate(ids) if token in controls]
        opened = all(ids[max(0, place - len(opening)) : place] == opening for place in places)
        if len(places) > allowed or not opened:
            raise VLLMValidationError(
                "the input holds text that is one of this model's control tokens; only the "
                "server sets these: remove it from the messages or the prompt",
                parameter="messages",
            )

    def _needs_decision_first(self) -> bool:
        # Whatever could reach the control logits before our processor does, or show the control
        # token in the text, or needs the margins. The paper's rule reads all other logits too.
        params = self.params
        reads_all = self.steering.controls.rule is Rule.PAPER
        return bool(
            self.steering.report
            or self.steering.continues
            or params.structured_outputs is not None
            or params.allowed_token_ids
            or params.bad_words
            or params.repetition_penalty != 1.0
            or params.thinking_token_budget is not None
            or not params.skip_special_tokens
            or (reads_all and (params.logit_bias or params.min_tokens))
        )

    async def _in_one_pass(self, prompt: Any) -> Outputs:
        params = self._steered(self.params)
        if params.max_tokens is not None:
            params.max_tokens = min(params.max_tokens, self.engine.model_config.max_model_len) + 1
        if params.min_tokens:
            params.min_tokens += 1
        delta = params.output_kind is RequestOutputKind.DELTA
        opened: set[int] = set()
        stream = self.engine.generate_stock(prompt, params, self.request_id, **self.options)
        async with aclosing(stream):
            async for output in stream:
                for choice in output.outputs:
                    if choice.index not in opened and choice.token_ids:
                        opened.add(choice.index)
                        self._record(choice.index, choice.token_ids[0], output)
                        drop_first_token(choice)
                    elif not delta and choice.token_ids:
                        drop_first_token(choice)
                shows = any(choice.token_ids for choice in output.outputs)
                if shows or output.finished or output.prompt_logprobs:
                    yield output

    async def _decide_first(self, prompt: Any, ids: list[int]) -> Outputs:
        opening = ids
        if self.steering.continues:
            opening = self._before_last_turn(ids)
        tokens = await self._decision_pass(prompt, opening)
        streams = [
            self._continue(prompt, ids, opening, token, index) for index, token in enumerate(tokens)
        ]
        one_stream = streams[0] if len(streams) == 1 else _merged(streams, self.params.output_kind)
        async with aclosing(one_stream):
            async for output in one_stream:
                yield output

    def _before_last_turn(self, ids: list[int]) -> list[int]:
        respond = self.engine.manifest.respond.id
        if respond not in ids:
            raise VLLMValidationError(
                "continue_final_message: the prompt does not reach back to the start of that "
                "message",
                parameter="messages",
            )
        return ids[: len(ids) - 1 - ids[::-1].index(respond)]

    async def _decision_pass(self, prompt: Any, opening: list[int]) -> list[int]:
        # Greedy and the paper's rule choose the same token for every choice of a request.
        draws = self.steering.controls.rule is Rule.SAMPLE
        params = self._steered(
            SamplingParams(
                n=self.params.n if draws else 1,
                temperature=self.params.temperature,
                seed=self.params.seed,
                max_tokens=1,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                logprob_token_ids=self.engine.manifest.control_ids
                if self.steering.report
                else None,
            )
        )
        final: RequestOutput | None = None
        stream = self.engine.generate_stock(
            _with_ids(prompt, opening), params, f"{self.request_id}-decision", **self.options
        )
        async for output in stream:
            final = output
        if final is None or not all(choice.token_ids for choice in final.outputs):
            raise VLLMValidationError("the request was aborted before its decision")
        choices = final.outputs if draws else final.outputs * self.params.n
        for index, choice in enumerate(choices):
            self._record(index, choice.token_ids[0], final, self._margins(choice))
        return [choice.token_ids[0] for choice in choices]

    def _continue(
        self, prompt: Any, ids: list[int], opening: list[int], token: int, index: int
    ) -> Outputs:
        refused = token in self.engine._category_of
        params = copy.copy(self.params)
        params.n = 1
        if params.seed is not None:
            params.seed += index
        if refused:
            params.structured_outputs = None
        params.extra_args = _without_controls(params.extra_args)
        goes_on = self.steering.continues and not refused
        request_id = self.request_id if self.params.n == 1 else f"{self.request_id}-{index}"
        return self.engine.generate_stock(
            _with_ids(prompt, ids if goes_on else [*opening, token]),
            params,
            request_id,
            **self.options,
        )

    async def _beam(self, prompt: Any, ids: list[int]) -> Outputs:
        # vLLM's beam search calls once a beam and step, with the text so far as the prompt. The
        # first call, alone by construction, decides; all of them go on after its token.
        if self.call == 0:
            self.steering.beam_start = len(ids)
            (self.steering.beam_token,) = await self._decision_pass(prompt, ids)
        start = self.steering.beam_start
        params = copy.copy(self.params)
        params.extra_args = _without_controls(params.extra_args)
        after = [*ids[:start], self.steering.beam_token, *ids[start:]]
        stream = self.engine.generate_stock(
            _with_ids(prompt, after), params, self.request_id, **self.options
        )
        async with aclosing(stream):
            async for output in stream:
                yield output

    def _steered(self, params: SamplingParams) -> SamplingParams:
        controls = self.steering.controls
        steered = copy.copy(params)
        steered.skip_clone = True
        steered._all_stop_token_ids = set(params._all_stop_token_ids)
        if controls.rule is Rule.SAMPLE and steered.seed is None:
            # The worker draws from the seed, and vLLM gives each of n choices its own.
            steered.seed = secrets.randbits(31)
        steered.extra_args = {
            **(params.extra_args or {}),
            EXTRA_ARGS_KEY: controls.to_wire(),
        }
        return steered

    def _record(
        self,
        index: int,
        token: int,
        output: RequestOutput,
        margins: tuple[float, ...] | None = None,
    ) -> None:
        category = self.engine._category_of.get(token)
        self.steering.decisions[self.call, index] = Decision(category, margins)
        # A whole answer is seen when it ends; vLLM's own statistics know when it began.
        stats = output.metrics
        waited_s = stats.first_token_latency if stats else time.monotonic() - self.started_s
        metrics.DECISION_LATENCY.observe(waited_s)
        metrics.DECISIONS.labels(
            "respond" if category is None else "refuse",
            "" if category is None else self.engine.manifest.names[category],
            self.steering.controls.rule.name.lower(),
        ).inc()

    def _margins(self, choice: CompletionOutput) -> tuple[float, ...] | None:
        if not self.steering.report or not choice.logprobs:
            return None
        manifest = self.engine.manifest
        step: dict[int, Logprob] = choice.logprobs[0]
        respond = step[manifest.respond.id].logprob
        return tuple(step[c.id].logprob - respond for c in manifest.categories)

    def _note_refusals(self, output: RequestOutput) -> None:
        if self.steering.beam_search:  # these are steps of beams, and vLLM makes the text of them
            return
        delta = self.params.output_kind is RequestOutputKind.DELTA
        texts = self.steering.refusal_texts
        for choice in output.outputs:
            place = (self.call, choice.index)
            decision = self.steering.decisions.get(place)
            if decision is not None and decision.category is not None:
                texts[place] = texts.get(place, "") + choice.text if delta else choice.text


def _prompt_ids(prompt: Any) -> list[int]:
    if not isinstance(prompt, dict) or prompt.get("type") not in ("token", "multimodal"):
        raise VLLMValidationError(
            "this server decides on token prompts only: send messages, text or token ids"
        )
    ids: list[int] = prompt["prompt_token_ids"]
    return ids


def _check_params(params: SamplingParams, control_ids: frozenset[int]) -> None:
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids", "logprob_token_ids"):
        value = getattr(params, name)
        if value and not control_ids.isdisjoint(value):
            raise VLLMValidationError(
                f"{name} names a control token of this model; the `refusal` object is what moves "
                "its decisions",
                parameter=name,
            )


def _with_ids(prompt: Any, ids: list[int]) -> Any:
    changed = {**prompt, "prompt_token_ids": ids}
    changed.pop("prompt_token_offsets", None)
    return changed


def _without_controls(extra_args: dict[str, Any] | None) -> dict[str, Any] | None:
    return {k: v for k, v in (extra_args or {}).items() if k != EXTRA_ARGS_KEY} or None


async def _merged(streams: list[Outputs], kind: RequestOutputKind) -> Outputs:
    latest: dict[int, RequestOutput] = {}
    finished: set[int] = set()
    async for index, output in merge_async_iterators(*streams):
        output.outputs[0].index = index
        latest[index] = output
        if output.finished:
            finished.add(index)
        output.finished = len(finished) == len(streams)
        if kind is RequestOutputKind.DELTA:
            yield output
    if kind is not RequestOutputKind.DELTA:
        whole = latest[0]
        whole.outputs = [latest[index].outputs[0] for index in sorted(latest)]
        whole.finished = True
        yield whole


def parse_flags(arguments: Sequence[str]) -> Namespace:
    """Parses vLLM's own server flags.

    Args:
        arguments: As on the command line, ``--model`` included.

    Raises:
        ConfigError: A flag would be ignored here, or would lead around what was verified.
    """
    cli_env_setup()  # type: ignore[no-untyped-call]
    parser = make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]
    args: Namespace = parser.parse_args(list(arguments))
    for name, reason in UNSERVED_FLAGS.items():
        value = getattr(args, name)
        one_server = name == "api_server_count" and value == 1
        if value != parser.get_default(name) and not one_server:
            raise ConfigError(f"--{name.replace('_', '-')}: {reason}")
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    if args.gpu_memory_utilization == parser.get_default("gpu_memory_utilization"):
        _bound_cpu_cache()
    return args


def _bound_cpu_cache() -> None:
    # vLLM would take 92 % of the machine's memory, and not start where so much is not free.
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KVCACHE_GIB)


def serve(args: Namespace, manifest: Manifest, settings: Settings, defaults: Controls) -> None:
    """Starts the engine and answers HTTP until SIGTERM or SIGINT, on vLLM's own event loop.

    Args:
        args: What ``parse_flags`` returned.
        manifest: The checkpoint's, already verified.
        settings: The operator's settings.
        defaults: The controls of requests that bring none.
    """
    uvloop.run(_serve(args, manifest, settings, defaults))


async def _serve(
    args: Namespace, manifest: Manifest, settings: Settings, defaults: Controls
) -> None:
    try:
        _, sock = setup_server(args, reuse_port=False)
    except OSError as error:
        raise ConfigError(f"--port {args.port}: {error.strerror}") from error
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(
        usage_context=UsageContext.OPENAI_API_SERVER
    )
    interface = "SteeringV2" if config.use_v2_model_runner else "SteeringV1"
    config.model_config.logits_processors = [f"server.steering:{interface}"]
    engine = SteeredLLM(
        config,
        executor_class=Executor.get_class(config),
        log_stats=not args.disable_log_stats,
        log_requests=args.enable_log_requests,
        aggregate_engine_logging=args.aggregate_engine_logging,
        usage_context=UsageContext.OPENAI_API_SERVER,
    )
    try:
        engine.steer(manifest, defaults)
        await engine.reset_mm_cache()
        shutdown = await _serve_http(engine, args, sock, manifest, settings)
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)
    try:
        await shutdown
    finally:
        sock.close()


async def _serve_http(
    engine: SteeredLLM, args: Namespace, sock: Any, manifest: Manifest, settings: Settings
) -> Any:
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    app.include_router(build_router(manifest, engine))
    # Appended, not added: the innermost place, behind vLLM's authentication.
    app.user_middleware.append(Middleware(RefusalMiddleware, manifest=manifest, settings=settings))
    app.middleware_stack = None  # build_app has built it already; the next call builds it anew
    await init_app_state(engine, app.state, args, tasks)
    uvicorn_options: dict[str, Any] = {}
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
