"""Where strings stand in a body: what templates print, and what are the protocol's own words."""

from typing import Any, Literal

from server.apis.chat import CATEGORY_FIELD

# Of a body's fields those that no chat template prints. Every other one is guarded.
UNRENDERED = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "logit_bias",
        "model",
        "prompt_cache_key",
        "request_id",
        "safety_identifier",
        "stop",
        "stop_sequences",
        "structured_outputs",
        "text",
        "user",
    }
)
# The top-level strings that are text; others are flags and names.
TEXTS = frozenset({"system", "instructions", "input", "prompt", "suffix"})
# Their writer makes the turns, so only control tokens are broken in them.
RAW = frozenset({"prompt", "suffix"})
CONVERSATIONS = ("messages", "input")
# The fields that hold words of the protocol's own.
PROTOCOL = frozenset({*CONVERSATIONS, "system"})
# A grammar may be made of them: a mark in one would come back in the answer. Prose is safe.
SCHEMAS = frozenset(
    {"tools", "functions", "tool_choice", "response_format", "output_config", "definition"}
)
PROSE = frozenset({"description", "title", "$comment"})
# Fields whose words routes compare, in messages and items and in what these hold under CONTAINERS.
STRUCTURE = frozenset({"role", "type", "status", CATEGORY_FIELD})
CONTAINERS = frozenset({"content", "output", "summary", "tool_calls", "source", "tool"})
# The words that vLLM reads there.
WORDS = frozenset(
    {
        "audio_embeds",
        "audio_url",
        "base64",
        "completed",
        "custom_tool_call",
        "custom_tool_call_output",
        "function",
        "function_call",
        "function_call_output",
        "image",
        "image_embeds",
        "image_pil",
        "image_url",
        "in_progress",
        "incomplete",
        "input_audio",
        "input_image",
        "input_text",
        "message",
        "output_text",
        "prompt_embeds",
        "reasoning",
        "reasoning_text",
        "redacted_thinking",
        "refusal",
        "summary_text",
        "text",
        "thinking",
        "tool_addition",
        "tool_definition",
        "tool_reference",
        "tool_removal",
        "tool_result",
        "tool_use",
        "url",
        "video_embeds",
        "video_url",
    }
)
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
# vLLM decodes it, JSON in a string, before a template prints it.
ARGUMENTS = "arguments"

# Where a string stands: where the protocol has words of its own, in a schema, or elsewhere.
Place = Literal["protocol", "schema", "text"]


def place_of(name: str) -> Place:
    """Returns the place that a field of a body is."""
    if name in SCHEMAS:
        return "schema"
    return "protocol" if name in PROTOCOL else "text"


def place_in(place: Place, key: str, entry: Any) -> Place:
    """Returns the place that an entry of an object is."""
    if place == "schema":
        return "text" if key in PROSE and isinstance(entry, str) else "schema"
    if place == "protocol" and key in SCHEMAS:
        return "schema"
    return place if key in CONTAINERS else "text"
