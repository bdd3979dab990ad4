"""What a request's grammar may cost: all requests share the engine that follows it."""

import json
from typing import Any

from models.errors import NotAllowedError, RequestError
from server.settings import PREFIX

PARAM = "structured_outputs"
# Where the limit travels in vLLM's `additional_config`.
LIMIT_KEY = "rheostat_max_grammar_s"
# What vLLM calls the one of its libraries that bounds each of its steps.
BOUNDED_BACKEND = "guidance"
_KINDS = ("json", "regex", "choice", "grammar", "structural_tag")


def check_grammar(asked: Any, *, allowed: bool, most_bytes: int) -> None:
    """Checks what vLLM made of a request's grammar, whichever of its fields asked for it.

    Args:
        asked: vLLM's ``StructuredOutputsParams``.
        allowed: Whether the policy allows grammars.
        most_bytes: How long it may be, as text.

    Raises:
        RequestError: 403 or 400.
    """
    written = [value for kind in _KINDS if (value := getattr(asked, kind)) is not None]
    if written and not allowed:
        raise NotAllowedError(
            "the policy allows no grammars but `json_object`: leave out structured_outputs, "
            "response_format, text.format, output_config.format, and a tool_choice that forces a "
            "call",
            param=PARAM,
        )
    size = sum(map(_size, written))
    if size > most_bytes:
        raise RequestError(
            f"the grammar that structured_outputs, response_format or the tools ask for: {size} "
            f"bytes, and at most {most_bytes} here ({PREFIX}MAX_GRAMMAR_BYTES)",
            param=PARAM,
            status=400,
        )


def grammar_failed() -> RequestError:
    """Returns the error of a request whose grammar the engine gave up."""
    return RequestError(
        "no text follows the grammar that structured_outputs, response_format or the tools ask "
        f"for, or it takes more of the engine's time than {PREFIX}MAX_GRAMMAR_S allows",
        param=PARAM,
        status=400,
    )


def _size(value: Any) -> int:
    return len(value if isinstance(value, str) else json.dumps(value))
