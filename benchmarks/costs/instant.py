"""vLLM's app and ours over an engine that answers at once: what is left is the HTTP layer."""

import argparse
from collections.abc import MutableSequence
from pathlib import Path
from socket import socket
from typing import Any

from fastapi import FastAPI
from vllm import __version__ as vllm_version
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers.registry import renderer_from_config
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.prometheus import get_prometheus_registry

from models.controls import EXTRA_ARGS_KEY
from models.manifest import Manifest, load_manifest
from server import engine as seam
from server.app import Service, http_options
from server.dials.calibrations import load_calibrations
from server.engine import SteeredLLM, parse_flags
from server.generation.margins import Ticket
from server.generation.seam import Outputs
from server.margin_rows import map_rows
from server.policies.loading import Served
from server.policies.reloading import Policies
from server.settings import load_settings
from server.telemetry.listener import metrics_route
from server.telemetry.running import name_server, observers
from server.web.admission import Admission, Counts
from server.web.guard import build_guard
from server.workers.config import answers_at_once, steer_workers

TOKENS = 16
WORD = 300  # an ordinary id of the demo checkpoint
MARGIN = -3.0


class InstantLLM(SteeredLLM):
    """Answers with the respond token and then words, without an engine."""

    def __init__(self, config: VllmConfig, respond: int) -> None:
        self.vllm_config = config
        self.model_config = config.model_config
        self.scheduler_config = config.scheduler_config
        self.observability_config = config.observability_config
        self.renderer = renderer_from_config(config)
        self.input_processor = InputProcessor(config, self.renderer)
        self.log_stats = False
        self._respond = respond

    def __del__(self) -> None:
        """There is nothing to end."""

    @property
    def errored(self) -> bool:
        """Nothing can fail."""
        return False

    def generate_stock(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> Outputs:
        """Answers at once, as many tokens as are asked for."""
        return self._outputs(prompt, sampling_params, request_id)

    async def _outputs(self, prompt: Any, params: SamplingParams, request_id: str) -> Outputs:
        self._write_margins(params)
        ids = [self._respond, *[WORD] * ((params.max_tokens or TOKENS) - 1)]
        if params.output_kind is not RequestOutputKind.DELTA:
            yield self._output(prompt, request_id, ids, finished=True)
            return
        for place, token in enumerate(ids):
            yield self._output(prompt, request_id, [token], finished=place == len(ids) - 1)

    def _write_margins(self, params: SamplingParams) -> None:
        wanted = (params.extra_args or {}).get(EXTRA_ARGS_KEY, {}).get("ticket")
        if wanted is not None:
            ticket = Ticket(*wanted)
            row = map_rows(ticket.path, len(self.manifest.categories))[ticket.row].numpy()
            row[:], row[0] = MARGIN, ticket.tag

    def _output(
        self, prompt: Any, request_id: str, ids: list[int], *, finished: bool
    ) -> RequestOutput:
        words = [token for token in ids if token != self._respond]
        completion = CompletionOutput(
            index=0,
            text=" word" * len(words),
            token_ids=ids,
            cumulative_logprob=None,
            logprobs=None,
            finish_reason="length" if finished else None,
        )
        return RequestOutput(
            request_id=request_id,
            prompt=None,
            prompt_token_ids=prompt["prompt_token_ids"],
            prompt_logprobs=None,
            outputs=[completion],
            finished=finished,
        )


class InstantStock(InstantLLM):
    """The same without decisions."""

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> Outputs:
        """Answers at once."""
        return self.generate_stock(prompt, sampling_params, request_id)


async def stock_app(checkpoint: Path) -> FastAPI:
    """Returns vLLM's own app."""
    args, config, manifest = _configured(checkpoint)
    app: FastAPI = build_app(args, ("generate",), config.model_config)
    engine = InstantStock(config, manifest.respond.id)
    await init_app_state(engine, app.state, args, ("generate",))
    return app


async def own_app(checkpoint: Path, counts: Counts | None = None) -> FastAPI:
    """Returns ours; the environment holds its settings.

    Args:
        checkpoint: The served one's folder.
        counts: The answers under way of several processes; None: this is the only one.
    """
    args, config, manifest = _configured(checkpoint)
    settings = load_settings()
    policies = Policies(settings, Served(manifest, load_calibrations(checkpoint, manifest)))
    name = str(config.model_config.served_model_name)
    name_server(name, vllm_version, policies.served)
    tokenizer: Any = cached_tokenizer_from_config(config.model_config)
    steer_workers(config, settings, tokenizer)
    guard = build_guard(tokenizer, manifest, config.model_config.max_model_len)
    engine = _Generating(config, manifest.respond.id)
    engine.steer(manifest, settings, guard.mark, policies.strictest)
    service = Service(
        manifest,
        settings,
        policies,
        Admission(answers_at_once(config), counts=counts),
        guard,
        None,
        observers(manifest, name, spans=False, json=False),
        metrics_route(get_prometheus_registry()),
    )
    return await seam._app(engine, args, service)


async def serve_own(
    checkpoint: Path, sock: socket, loads: MutableSequence[int], counts: Counts | None, index: int
) -> None:
    """Answers on a socket with our app, as one of several processes, until it is killed.

    Args:
        checkpoint: The served one's folder.
        sock: Bound.
        loads: Open connections of each process.
        counts: The answers under way of all; None: this is the only process.
        index: Of this process.
    """
    app = await own_app(checkpoint, counts)
    args, _, _ = _configured(checkpoint)
    options = http_options(args, load_settings(), get_uvicorn_log_config(args))
    await serve_http(app, sock=sock, peer_loads=(loads, index), **options)


class _Generating(InstantLLM):
    async def get_supported_tasks(self) -> tuple[Any, ...]:
        return ("generate",)


def _configured(checkpoint: Path) -> tuple[argparse.Namespace, VllmConfig, Manifest]:
    flags = ["--model", str(checkpoint), "--served-model-name", "demo", "--dtype", "float32"]
    args = parse_flags([*flags, "--enforce-eager", "--max-model-len", "512"])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    return args, config, load_manifest(checkpoint)
