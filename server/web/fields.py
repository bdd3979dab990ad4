"""Fields of vLLM's that no request may bring here: each would lead around the decision step."""

from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from models.controls import EXTRA_ARGS_KEY
from models.errors import RequestError

_BETWEEN_INSTANCES = (
    "it is what vLLM's own instances of a disaggregated installation tell each other, and may hold "
    "a prompt past the chat template"
)
_NOT_STORED = "responses are not stored here: send the earlier items in `input`"
# Arguments of the renderer, not variables of a template: they cut, fill or end the prompt. And the
# texts of special tokens, which the renderer hands to every template.
TEMPLATE_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "bos_token",
        "chat_template",
        "cls_token",
        "continue_final_message",
        "conversation",
        "eos_token",
        "mask_token",
        "max_length",
        "messages",
        "pad_token",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "sep_token",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
        "unk_token",
    }
)
ENGINE_ARGUMENTS = frozenset({EXTRA_ARGS_KEY, "kv_transfer_params", "ec_transfer_params"})
# Read by vLLM; its answer tells of all tenants' traffic.
LOAD_HEADER = "endpoint-load-metrics-format"
# Names that are copied into answers, events, traces and logs, with the headers that mean the same.
COPIED = (
    "model",
    "request_id",
    "session_id",
    "user",
    "cache_salt",
    "prompt_cache_key",
    "safety_identifier",
)
COPIED_HEADERS = (
    "X-Request-Id",
    "X-Session-ID",
    "X-Amzn-SageMaker-Adapter-Identifier",
    "X-Amzn-SageMaker-Session-Id",
)
MOST_NAME_CHARACTERS = 128


def _given(value: Any) -> bool:
    return value is not None


def _asked(value: Any) -> bool:
    return value not in (None, False)


REFUSED: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "kv_transfer_params": (_BETWEEN_INSTANCES, _given),
    "ec_transfer_params": (_BETWEEN_INSTANCES, _given),
    "prompt_embeds": ("the control tokens in embeddings cannot be seen: send text", _given),
    "previous_response_id": (_NOT_STORED, _given),
    "previous_input_messages": (_NOT_STORED, _given),
    "background": (_NOT_STORED, _asked),
    "chat_template": (
        "the checkpoint's own template is the one that its decision was trained with",
        _given,
    ),
}
RESERVED: Mapping[str, tuple[str, frozenset[str]]] = {
    "chat_template_kwargs": ("an argument of the renderer", TEMPLATE_ARGUMENTS),
    "vllm_xargs": ("an argument of the engine's own", ENGINE_ARGUMENTS),
}


def refuse_fields(body: Mapping[str, Any]) -> None:
    """Refuses a body that holds one of them, or too long a name, whatever its route.

    Raises:
        RequestError: With the field's path and the reason.
    """
    for name, (reason, counts) in REFUSED.items():
        if name in body and counts(body[name]):
            raise _refused(name, reason)
    _check_lengths(body, COPIED)
    for name, (what, keys) in RESERVED.items():
        given = body.get(name)
        reserved = sorted(keys.intersection(given)) if isinstance(given, dict) else []
        if reserved:
            raise _refused(f"{name}.{reserved[0]}", f"it is {what}, and no request may set it")


def refuse_headers(headers: Mapping[str, str]) -> None:
    """Refuses headers that no tenant's request may bring, or too long a name in one.

    Raises:
        RequestError: With the header and the reason.
    """
    if LOAD_HEADER in headers:
        raise _refused(
            LOAD_HEADER, "the load is that of all callers; the operator reads it from /metrics"
        )
    _check_lengths(headers, COPIED_HEADERS)


def _check_lengths(given: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        value = given.get(name)
        if isinstance(value, str) and len(value) > MOST_NAME_CHARACTERS:
            raise _refused(
                name, f"it has {len(value)} characters, and at most {MOST_NAME_CHARACTERS} here"
            )


def _refused(path: str, reason: str) -> RequestError:
    return RequestError(f"{path}: {reason}", param=path, status=HTTPStatus.BAD_REQUEST)
