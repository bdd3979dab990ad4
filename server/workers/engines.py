"""vLLM's configuration of engines and their HTTP processes, and engines without any."""

from argparse import Namespace
from typing import TYPE_CHECKING

from server import vllm_names
from server.settings import Settings
from server.workers.config import put_into_flags, steer_workers

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def engine_config(args: Namespace, index: int = 0, *, headless: bool = False) -> "VllmConfig":
    """Returns vLLM's configuration, with the parsers of plugins known to this process.

    Args:
        args: vLLM's flags.
        index: Of the HTTP process; what starts several has -1.
        headless: Whether this node answers no HTTP.
    """
    if args.tool_parser_plugin:
        vllm_names.ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:  # the configuration names its parser
        vllm_names.ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    wanted = vllm_names.AsyncEngineArgs.from_cli_args(args)
    wanted._api_process_count = args.api_server_count or 1
    wanted._api_process_rank = index
    usage = vllm_names.UsageContext.OPENAI_API_SERVER
    config: VllmConfig = wanted.create_engine_config(usage_context=usage, headless=headless)
    return config


def join(args: Namespace, settings: Settings) -> None:
    """Runs engines for a server on another machine, until a signal.

    Args:
        args: vLLM's flags; changed in place.
        settings: The operator's.
    """
    config = engine_config(args, headless=True)
    tokenizer = vllm_names.cached_tokenizer_from_config(config.model_config)
    steer_workers(config, settings, tokenizer)
    put_into_flags(config, args)
    args.api_server_count = 0
    vllm_names.run_headless(args)
