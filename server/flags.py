"""vLLM's flags and switches: those that are refused, and other defaults for some."""

import logging
import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from models.errors import ConfigError
from server.generation.grammars import BOUNDED_BACKEND

logger = logging.getLogger(__name__)

CPU_KVCACHE_GIB = "2"

UNSERVED = {
    "grpc": "only HTTP is served",
    "tokenizer": "the control tokens are verified against the checkpoint's own tokenizer",
    "skip_tokenizer_init": "the control tokens are read and hidden with the tokenizer",
    "chat_template": "put it into the checkpoint as chat_template.jinja, where it is verified",
    "trust_request_chat_template": "a client's template would move the decision step",
    "tokenizer_mode": "special tokens are found as the checkpoint's own tokenizer finds them",
    "enable_prompt_embeds": "embeddings have no token ids that could be checked",
    "tool_server": "its turns would hold no control tokens",
    "scheduler_cls": "the scheduler here bounds what a request's grammar costs others",
    "logits_processors": "the decision is the one logits processor here",
    "worker_extension_cls": "through it each worker says which steering it runs",
    "enable_elastic_ep": "an engine that joins later would not be asked which steering it runs",
    "data_parallel_multi_port_external_lb": "start one server a rank, with --data-parallel-rank",
    "logprobs_mode": "a report reads the model's own margins from raw log-probabilities",
}

# They find keys and values by the tokens of a prefix: these belong to the prompt that was checked.
PREFIX_STORES = frozenset(
    {
        *("OffloadingConnector", "SimpleCPUOffloadConnector", "FlexKVConnectorV1"),
        *("LMCacheConnectorV1", "LMCacheMPConnector", "MooncakeStoreConnector"),
    }
)

SWITCHES = {
    "VLLM_ENABLE_RESPONSES_API_STORE": "nothing that a model said is kept here, for no tenant",
    "VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT": "it opens turns that have no control token",
    "VLLM_ENABLE_COHERE_API": "Cohere's API has no word for a refusal",
    "VLLM_USE_RUST_FRONTEND": "it would answer without this server",
}


def refuse_unserved(args: Namespace, default_of: Callable[[str], Any]) -> None:
    """Rejects flags that this server would ignore, or that would bypass what was verified.

    Args:
        args: As parsed.
        default_of: Returns a flag's default.

    Raises:
        ConfigError: Names the flag and the reason.
    """
    for name, reason in UNSERVED.items():
        if getattr(args, name) != default_of(name):
            raise ConfigError(f"--{name.replace('_', '-')}: {reason}")
    _refuse_split_prefill(args)
    _check_http_processes(args)


def refuse_switched_on(value_of: Callable[[str], Any]) -> None:
    """Rejects vLLM's environment variables that switch on what is not served here.

    Args:
        value_of: Returns a variable's value, as vLLM reads it.

    Raises:
        ConfigError: Names the variable and the reason.
    """
    for name, reason in SWITCHES.items():
        if value_of(name):
            raise ConfigError(f"{name} must not be set: {reason}")


def _refuse_split_prefill(args: Namespace) -> None:
    """Rejects prefill and decode in different instances of vLLM.

    The decode instance takes the prompt's keys and values from where `kv_transfer_params` say, and
    no request may bring these: nobody here could tell which prompt they belong to.

    Raises:
        ConfigError: Names the connector.
    """
    wanted = args.kv_transfer_config
    if wanted is None or (wanted.kv_role == "kv_both" and wanted.kv_connector in PREFIX_STORES):
        return
    raise ConfigError(
        f"--kv-transfer-config: {wanted.kv_connector} with the role {wanted.kv_role} hands a "
        "prompt's keys and values from one instance to another, past the check of the prompt; "
        f"served are stores of prefixes, with the role kv_both: {', '.join(sorted(PREFIX_STORES))}"
    )


def _check_http_processes(args: Namespace) -> None:
    """Rejects a number of HTTP processes that cannot be served.

    Raises:
        ConfigError: It says why.
    """
    count = args.api_server_count
    if count is None or (count == 1 and not args.headless):
        return
    if args.headless:
        raise ConfigError("--api-server-count: a --headless node answers no HTTP")
    if count < 1:
        raise ConfigError("--api-server-count: at least one process has to answer")
    if args.data_parallel_backend == "ray":
        raise ConfigError("--api-server-count: it was not tried with --data-parallel-backend ray")


def fit_to_cpu(args: Namespace, default_of: Callable[[str], Any], *, fast_bfloat16: bool) -> None:
    """Changes defaults, in place, that do not work on a CPU.

    Args:
        args: As parsed.
        default_of: Returns a flag's default.
        fast_bfloat16: Whether the processor multiplies bfloat16 numbers itself.

    Raises:
        ConfigError: A flag would end vLLM's engine there.
    """
    if args.gpu_memory_utilization == default_of("gpu_memory_utilization"):
        # vLLM would take 92 % of the machine's memory, and not start where so much is not free.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CPU_KVCACHE_GIB)
    if args.dtype == "auto" and not fast_bfloat16:
        # vLLM would take bfloat16, which costs such a processor several times as much.
        logger.info("this processor has no bfloat16 arithmetic: --dtype float32")
        args.dtype = "float32"
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        return
    # The V1 runner rewinds the generator of a seeded request whose prefill is cut in two, and a
    # CPU's generators cannot be rewound: the engine would end, and with it all clients' requests.
    if args.enable_chunked_prefill:
        raise ConfigError(
            "--enable-chunked-prefill: on a CPU a request with a seed would end vLLM's engine"
        )
    args.enable_chunked_prefill = False


def has_fast_bfloat16() -> bool:
    """Returns whether this processor multiplies bfloat16 numbers itself."""
    import torch

    known = torch.cpu.get_capabilities()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def bound_grammars(args: Namespace) -> None:
    """Chooses the grammar library whose steps are bounded, in place, unless a flag chooses another.

    xgrammar, vLLM's first choice, may stand still for minutes in one step of a regex of 20
    characters.
    """
    wanted = args.structured_outputs_config
    if wanted.backend in ("auto", BOUNDED_BACKEND):
        wanted.backend = BOUNDED_BACKEND
        # xgrammar would leave the same properties out.
        wanted.disable_additional_properties = True
        # The library does not know the tags that vLLM would make of a forced call: it gets the
        # tools' JSON schemas.
        os.environ.setdefault("VLLM_ENFORCE_STRICT_TOOL_CALLING", "0")
