"""The parts of the engine seam that need no running engine; tests/e2e has the rest."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from tokenizers import AddedToken
from tokenizers.decoders import DecodeStream
from vllm.entrypoints.serve.elastic_ep.middleware import ScalingMiddleware
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.middleware.x_request_id import XRequestIdMiddleware
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.platforms.cpu import CpuPlatform
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from models.checkpoint import PUBLISHED_REFUSALS, PUBLISHED_RESPOND
from models.controls import Controls, Rule
from models.errors import ConfigError
from models.manifest import Category, ControlToken, Manifest
from server.app import Service, put_layer
from server.context import DECISION_CONTEXT, TURN_IDS_KEY, DecisionContext
from server.dials.board import Resolution
from server.engine import ADDS_HEADERS, SteeredLLM, parse_flags
from server.flags import fit_to_cpu
from server.settings import Settings
from server.web.guard import build_guard
from server.web.middleware import RefusalMiddleware
from server.web.preflight import PreflightLayer
from tests.toy import byte_tokenizer


def published() -> tuple[Any, Manifest]:
    """Returns a tokenizer that holds the published tokens as ordinary ones, and its manifest."""
    tokenizer: Any = byte_tokenizer()
    texts = [*PUBLISHED_REFUSALS, PUBLISHED_RESPOND]
    tokenizer.add_tokens([AddedToken(text, special=False) for text in texts])
    ids = tokenizer.convert_tokens_to_ids(texts)
    categories = tuple(
        Category(name=name, token=text, id=ids[index])
        for index, (text, name) in enumerate(PUBLISHED_REFUSALS.items())
    )
    respond = ControlToken(token=PUBLISHED_RESPOND, id=ids[-1])
    return tokenizer, Manifest(respond=respond, categories=categories)


def steered(tokenizer: Any, manifest: Manifest) -> SteeredLLM:
    engine = SteeredLLM.__new__(SteeredLLM)
    renderer: Any = SimpleNamespace(get_tokenizer=lambda: tokenizer, shutdown=lambda: None)
    engine.renderer = renderer
    config: Any = SimpleNamespace(
        use_v2_model_runner=False,
        additional_config={TURN_IDS_KEY: []},
        model_config=SimpleNamespace(get_diff_sampling_param=lambda: {"repetition_penalty": 1.1}),
    )
    engine.vllm_config = config
    guard = build_guard(tokenizer, manifest)
    none, all_off = (0.0,) * len(manifest.categories), (False,) * len(manifest.categories)
    as_trained = Resolution(Controls(Rule.GREEDY, none, all_off))
    settings = Settings(max_grammar_bytes=256)
    engine.steer(manifest, settings, guard.mark, lambda: as_trained)
    return engine


def streamed(tokenizer: Any, ids: list[int]) -> str:
    """Decodes as vLLM's detokenizer does by default."""
    stream = DecodeStream(skip_special_tokens=True)
    return "".join(stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids)


def test_ordinary_control_tokens_are_not_printed_once_steered() -> None:
    tokenizer, manifest = published()
    text = tokenizer.encode("Hello", add_special_tokens=False)
    ids = [manifest.respond.id, *text]
    assert streamed(tokenizer, ids) == " [respond]Hello"
    steered(tokenizer, manifest)
    assert streamed(tokenizer, ids) == "Hello"
    for control in manifest.control_tokens:
        assert tokenizer.convert_tokens_to_ids(control.token) == control.id


def test_grammar_of_a_request_is_checked_before_vllm_reads_it() -> None:
    engine = steered(*published())
    context = DecisionContext(engine.unsteered(), grammars=True)
    token = DECISION_CONTEXT.set(context)
    try:
        long = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a" * 257))
        with pytest.raises(VLLMValidationError, match="257 bytes, and at most 256 here"):
            engine.generate("Hi", long, "id")
        short = SamplingParams(structured_outputs=StructuredOutputsParams(json={"enum": ["a"]}))
        engine.generate("Hi", short, "id")
        context.grammars = False
        with pytest.raises(GracefulHTTPError, match="policy allows no grammars") as raised:
            engine.generate("Hi", short, "id")
    finally:
        DECISION_CONTEXT.reset(token)
    assert raised.value.http_status == 403
    assert context.failure is not None
    with pytest.raises(GracefulHTTPError, match="policy allows no grammars"):  # of no request
        engine.generate("Hi", short, "id")


def test_client_that_would_change_the_answers_of_others_is_refused() -> None:
    engine = steered(*published())
    params = SamplingParams(logprob_token_ids=[1])
    with pytest.raises(VLLMValidationError, match="V1 model runner would give these"):
        engine.generate("Hi", params, "id")
    engine.margins_by_logprobs = True
    engine.generate("Hi", params, "id")


@pytest.mark.parametrize(
    "flags",
    [
        ["--grpc"],
        ["--api-server-count", "0"],
        ["--api-server-count", "2", "--headless"],
        ["--api-server-count", "2", "--data-parallel-backend", "ray"],
        ["--tokenizer", "elsewhere"],
        ["--skip-tokenizer-init"],
        ["--chat-template", "other.jinja"],
        ["--logits-processors", "some.module:Processor"],
        ["--trust-request-chat-template"],
        ["--enable-prompt-embeds"],
        ["--logprobs-mode", "processed_logprobs"],
        ["--tokenizer-mode", "slow"],
        ["--enable-chunked-prefill"],
        ["--tool-server", "demo"],
        ["--scheduler-cls", "some.module.Scheduler"],
        ["--worker-extension-cls", "some.module.Extension"],
        ["--enable-elastic-ep"],
        ["--data-parallel-multi-port-external-lb"],
    ],
    ids=lambda flags: flags[0],
)
def test_flags_that_would_be_ignored_are_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"^{flags[0]}: "):
        parse_flags(["--model", "somewhere", *flags])


@pytest.mark.parametrize(
    ("connector", "role", "served"),
    [
        ("NixlConnector", "kv_both", False),
        ("OffloadingConnector", "kv_consumer", False),
        ("DecodeBenchConnector", "kv_both", False),
        ("OffloadingConnector", "kv_both", True),
    ],
)
def test_prefill_and_decode_apart_are_refused(connector: str, role: str, served: bool) -> None:
    flag = ["--kv-transfer-config", json.dumps({"kv_connector": connector, "kv_role": role})]
    if served:
        assert parse_flags(["--model", "somewhere", *flag]).kv_transfer_config.kv_role == role
        return
    with pytest.raises(ConfigError, match=f"^--kv-transfer-config: {connector} with the role"):
        parse_flags(["--model", "somewhere", *flag])


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_ENABLE_RESPONSES_API_STORE",
        "VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT",
        "VLLM_ENABLE_COHERE_API",
        "VLLM_USE_RUST_FRONTEND",
    ],
)
def test_switches_that_are_not_served_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "0")
    parse_flags(["--model", "somewhere"])
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"^{name} must not be set: .*[^\n]$"):
        parse_flags(["--model", "somewhere"])


@pytest.mark.parametrize(
    ("fast", "flags", "chosen"),
    [
        (False, [], "float32"),
        (True, [], "auto"),
        (False, ["--dtype", "bfloat16"], "bfloat16"),
    ],
)
def test_processors_without_bfloat16_compute_in_float32(
    fast: bool, flags: list[str], chosen: str
) -> None:
    args = parse_flags(["--model", "somewhere", "--dtype", "auto"])
    args.dtype, args.enable_chunked_prefill = flags[1] if flags else "auto", None

    fit_to_cpu(args, lambda name: getattr(args, name), fast_bfloat16=fast)

    assert args.dtype == chosen


def test_prefills_of_a_cpu_are_never_cut() -> None:
    assert parse_flags(["--model", "somewhere"]).enable_chunked_prefill is False


def test_grammars_are_followed_by_the_library_that_bounds_its_steps() -> None:
    bounded = parse_flags(["--model", "somewhere"]).structured_outputs_config
    assert (bounded.backend, bounded.disable_additional_properties) == ("guidance", True)
    flag = ["--structured-outputs-config.backend", "xgrammar"]
    chosen = parse_flags(["--model", "somewhere", *flag]).structured_outputs_config
    assert (chosen.backend, chosen.disable_additional_properties) == ("xgrammar", False)


def test_ray_needs_another_platform_than_a_cpu() -> None:
    """Once vLLM has Ray on CPUs, tests/e2e/test_ranks.py has to try it."""
    assert CpuPlatform.ray_device_key == ""


@pytest.mark.parametrize(("flags", "seconds"), [([], 30), (["--shutdown-timeout", "0"], 0)])
def test_server_drains_unless_told_otherwise(flags: list[str], seconds: int) -> None:
    assert parse_flags(["--model", "somewhere", *flags]).shutdown_timeout == seconds


def test_flags_of_vllm_are_kept() -> None:
    args = parse_flags(["--model", "somewhere", "--port", "7", "--tensor-parallel-size", "2"])
    assert (args.model, args.port, args.tensor_parallel_size) == ("somewhere", 7, 2)


def test_only_what_adds_headers_stands_outside_of_our_layer() -> None:
    theirs: list[Any] = [
        *(ScalingMiddleware, XRequestIdMiddleware, AuthenticationMiddleware, CORSMiddleware)
    ]
    app: Any = SimpleNamespace(user_middleware=[Middleware(cls) for cls in theirs])
    service: Any = SimpleNamespace(**dict.fromkeys(Service.__dataclass_fields__))
    put_layer(app, service, replaced=AuthenticationMiddleware, outside=ADDS_HEADERS)
    assert [m.cls for m in app.user_middleware] == [
        *(PreflightLayer, XRequestIdMiddleware, CORSMiddleware),
        *(RefusalMiddleware, ScalingMiddleware),
    ]
