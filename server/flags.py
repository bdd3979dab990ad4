"""vLLM's flags and switches that this server does not pass on."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from models.errors import ConfigError

UNSERVED = {
    "headless": "this is one HTTP server with its engine; run vLLM's own for engines without one",
    "grpc": "only HTTP is served",
    "api_server_count": "one HTTP process a server; put several servers behind the gateway",
    "tokenizer": "the control tokens are verified against the checkpoint's own tokenizer",
    "skip_tokenizer_init": "the control tokens are read and hidden with the tokenizer",
    "chat_template": "put it into the checkpoint as chat_template.jinja, where it is verified",
    "trust_request_chat_template": "a client's template would move the decision step",
    "tokenizer_mode": "special tokens are found as the checkpoint's own tokenizer finds them",
    "enable_prompt_embeds": "embeddings have no token ids that could be checked",
    "tool_server": "its turns would hold no control tokens",
    "scheduler_cls": "the scheduler here bounds what a request's grammar costs others",
    "logits_processors": "the decision is the one logits processor here",
    "logprobs_mode": "a report reads the model's own margins from raw log-probabilities",
}

SWITCHES = {
    "VLLM_ENABLE_RESPONSES_API_STORE": "nothing that a model said is kept here, for no tenant",
    "VLLM_USE_EXPERIMENTAL_PARSER_CONTEXT": "it opens turns that have no control token",
    "VLLM_ENABLE_COHERE_API": "Cohere's API has no word for a refusal",
}


def refuse_unserved(args: Namespace, default_of: Callable[[str], Any]) -> None:
    """Refuses flags that would be ignored here, or would lead around what was verified.

    Args:
        args: As parsed.
        default_of: Gives a flag's default.

    Raises:
        ConfigError: With the flag and the reason.
    """
    for name, reason in UNSERVED.items():
        value = getattr(args, name)
        one_server = name == "api_server_count" and value == 1
        if value != default_of(name) and not one_server:
            raise ConfigError(f"--{name.replace('_', '-')}: {reason}")


def refuse_switched_on(value_of: Callable[[str], Any]) -> None:
    """Refuses vLLM's environment variables that switch on what is not served here.

    Args:
        value_of: Gives a variable's value, as vLLM reads it.

    Raises:
        ConfigError: With the variable and the reason.
    """
    for name, reason in SWITCHES.items():
        if value_of(name):
            raise ConfigError(f"{name} must not be set: {reason}")
