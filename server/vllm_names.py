"""Names of vLLM's that stand in another module in each version. The seam takes them from here.

A test imports the seam against the newest vLLM as well (tests/server/test_new_vllm.py). When it
names one that moved, its new module goes first in the list.
"""

from importlib import import_module
from typing import Any


def moved(name: str, *modules: str) -> Any:
    """Returns a name from the first of vLLM's modules that has it.

    Raises:
        ImportError: None has it.
    """
    for module in modules:
        try:
            found = import_module(f"vllm.{module}")
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("vllm."):
                raise
        else:
            if hasattr(found, name):
                return getattr(found, name)
    raise ImportError(f"vLLM has no {name} in {' or '.join(modules)}")


_FLAGS = ("entrypoints.common.cli_args", "entrypoints.launchers.cli_args")  # 0.33, 0.32
make_arg_parser = moved("make_arg_parser", *_FLAGS)
validate_parsed_serve_args = moved("validate_parsed_serve_args", *_FLAGS)
cli_env_setup = moved(
    "cli_env_setup", "entrypoints.common.startup", "entrypoints.serve.utils.api_utils"
)
run_headless = moved("run_headless", "entrypoints.cli.serve")
APIServerProcessManager = moved("APIServerProcessManager", "v1.utils")
bind_engine_zmq_listeners = moved("bind_engine_zmq_listeners", "v1.engine.utils")
launch_core_engines = moved("launch_core_engines", "v1.engine.utils")
setup_multiprocess_prometheus = moved("setup_multiprocess_prometheus", "v1.metrics.prometheus")
configure_logging_from_args = moved("configure_logging_from_args", "logger")
set_process_title = moved("set_process_title", "utils.system_utils")
setup_server = moved("setup_server", "entrypoints.launchers.launcher")
AsyncEngineArgs = moved("AsyncEngineArgs", "engine.arg_utils")
UsageContext = moved("UsageContext", "usage.usage_lib")
ReasoningParserManager = moved("ReasoningParserManager", "reasoning")
cached_tokenizer_from_config = moved("cached_tokenizer_from_config", "tokenizers.registry")
ToolParserManager = moved("ToolParserManager", "tool_parsers")
