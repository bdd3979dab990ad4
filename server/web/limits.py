"""What a request's head and its JSON may hold, before anything is made of them."""

from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import Scope

from models.controls import EXTRA_ARGS_KEY
from models.errors import RequestError
from server.settings import PREFIX, Settings
from server.web.bodies import flag

_BETWEEN_INSTANCES = (
    "it is what vLLM's own instances of a disaggregated installation tell each other, and may hold "
    "a prompt past the chat template"
)
_NOT_STORED = "responses are not stored here: send the earlier items in `input`"
_OWN_TEMPLATE = "the checkpoint's own template is the one that its decision was trained with"
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
LOAD_HEADER = b"endpoint-load-metrics-format"
# vLLM's processes tell each other numbers of at most 64 bits.
_PRIORITY, MOST_DIGITS = b"x-vllm-priority", 18
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
_COPIED_HEADERS = {name.lower().encode(): name for name in COPIED_HEADERS}
MOST_NAME_CHARACTERS = 128
# What vLLM reads once, however many choices and prompts there are.
_READ_ONCE = frozenset(
    {
        *("messages", "input", "prompt", "system", "instructions", "documents", "inputs"),
        "metadata",
        *COPIED,
    }
)
_MOST_NUMBER = 2**63 - 1
# Of a stop string or a bad word.
MOST_WORD_CHARACTERS = 1024
_INT = TypeAdapter(int)
# Strict where Python's own parser is not: NaN, infinities, halves of surrogate pairs and other
# encodings are errors.
_JSON = msgspec.json.Decoder(dict[str, Any])
_ONE_KIND_OF_BRACKET = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def check_head(scope: Scope, settings: Settings) -> None:
    """Holds the address and the headers to their bounds.

    Raises:
        RequestError: 413 or 414, with the bound and its setting.
    """
    length = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
    if length > settings.max_url_bytes:
        raise _beyond(
            "the address", length, "max_url_bytes", settings, HTTPStatus.REQUEST_URI_TOO_LONG
        )
    headers = scope["headers"]
    if len(headers) > settings.max_headers:
        raise _beyond("the number of headers", len(headers), "max_headers", settings)
    size = sum([len(name) + len(value) for name, value in headers])
    if size > settings.max_header_bytes:
        raise _beyond("the size of all headers", size, "max_header_bytes", settings)


def read_json(raw: bytes, settings: Settings) -> dict[str, Any]:
    """Returns a body's JSON object.

    Args:
        raw: Not empty.
        settings: The bounds.

    Raises:
        RequestError: It is none, holds what JSON or the engine has no number for, or too much.
    """
    _check_values(raw, settings)
    try:
        body: dict[str, Any] = _JSON.decode(raw)
        msgspec.msgpack.encode(body)  # as vLLM's processes tell each other: in at most 64 bits
    except RecursionError as error:
        raise RequestError("the body nests too deeply", status=HTTPStatus.BAD_REQUEST) from error
    except OverflowError as error:
        raise RequestError(
            "the body holds an integer of more than 64 bits", status=HTTPStatus.BAD_REQUEST
        ) from error
    except ValueError as error:  # msgspec's own errors are, and those of bytes that are no UTF-8
        raise RequestError(
            f"the body must be a JSON object in UTF-8: {error}", status=HTTPStatus.BAD_REQUEST
        ) from error
    _check_counts(body, settings)
    return body


def write_json(body: Mapping[str, Any]) -> bytes:
    """Returns what vLLM reads of a body, so that its parser never sees what ours did not.

    Raises:
        RequestError: It nests deeper than the writer goes.
    """
    try:
        return msgspec.json.encode(body)
    except RecursionError as error:
        raise RequestError("the body nests too deeply", status=HTTPStatus.BAD_REQUEST) from error


def _check_values(raw: bytes, settings: Settings) -> None:
    # Before anything is made of them, and without a loop of Python's over them. A backslash
    # stands in strings only, so what is left are whole strings between quotes.
    text = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    _hold("the number of strings in the body", text.count(b'"') // 2, "max_body_strings", settings)
    outside = b"".join(text.split(b'"')[::2])
    opened = outside.count(b"[") + outside.count(b"{")
    _hold("the number of lists and objects in the body", opened, "max_body_strings", settings)
    # Each value is the first of its list or object, or follows a comma; within strings too, where
    # the arguments of tool calls are JSON.
    values = opened + raw.count(b",")
    _hold("the number of values in the body", values, "max_body_values", settings)
    if opened > settings.max_body_depth:  # no container is deeper than there are containers
        _check_depth(outside, settings)


def _check_depth(outside: bytes, settings: Settings) -> None:
    left = outside.translate(_ONE_KIND_OF_BRACKET, delete=_NO_BRACKETS)
    for _ in range(settings.max_body_depth):  # each round takes the innermost ones out
        left = left.replace(b"[]", b"")
    if b"[]" in left:
        deeper = settings.max_body_depth + 1
        _hold("the depth of the body", deeper, "max_body_depth", settings)


def prompts_in(body: dict[str, Any]) -> int:
    """Returns how many prompts a body holds: those of a batch, or one."""
    return max(1, _conversations(body.get("messages")), _prompts(body.get("prompt")))


def number(body: dict[str, Any], name: str) -> int:
    """Returns a field as vLLM's models read it, up to 2^63: "2" and 2.0 are 2, the invalid is 0."""
    if name not in body:
        return 0
    try:
        return min(_INT.validate_python(body[name]), _MOST_NUMBER)
    except ValidationError:
        return 0


def _check_counts(body: dict[str, Any], settings: Settings) -> None:
    for name, conversation in _all_conversations(body):
        entries = _entries(conversation, settings.max_messages)
        _hold(name, entries, "max_messages", settings, name)
    if _COUNTED.isdisjoint(body) and not _conversations(body.get("messages")):
        return  # one choice of one prompt
    for name, bound, counted in _COUNTS:
        if name in body:
            _hold(name, counted(body[name]), bound, settings, name)
    for name in _WORDS:
        if name in body:
            _check_words(name, body[name], settings)
    widest = max(1, number(body, "n"), number(body, "best_of"))
    choices = widest * prompts_in(body)
    if "n" in body or "best_of" in body or "prompt" in body:
        _hold("n times the number of prompts", choices, "max_choices", settings, "n")
    if choices > 1:
        _check_repeated(body, choices, settings)
    if flag(body, "use_beam_search"):
        _check_beams(body, widest, settings)


def _check_repeated(body: dict[str, Any], choices: int, settings: Settings) -> None:
    # Each choice of each prompt has parameters of its own, made and checked one after another.
    # Tools belong to them where a call is forced: their schemas are its grammar.
    read_once = _READ_ONCE
    if body.get("tool_choice") in (None, "auto", "none"):
        read_once = _READ_ONCE | {"tools"}
    sizes = {
        name: len(msgspec.json.encode(value))
        for name, value in body.items()
        if name not in read_once and isinstance(value, list | dict | str)
    }
    if sizes:
        size = sum(sizes.values())
        what = f"{size} bytes of fields for each of {choices} choices (n times the prompts)"
        largest = max(sizes, key=sizes.__getitem__)
        _hold(what, size * choices, "max_repeated_bytes", settings, largest)


def _check_beams(body: dict[str, Any], beams: int, settings: Settings) -> None:
    # vLLM keeps those of all candidates of each step, whatever top_logprobs says, and writes them
    # for the beams that are left.
    if body.get("logprobs") is None or body["logprobs"] is False:
        return
    named = max(number(body, "max_tokens"), number(body, "max_completion_tokens"))
    tokens = named or settings.max_logprobs  # as many as the context holds
    found = beams * tokens * (2 * beams + 1)
    what = "log-probabilities of beams, n * max_tokens * (2 * n + 1)"
    _hold(what, found, "max_logprobs", settings, "logprobs")


def _check_words(name: str, value: Any, settings: Settings) -> None:
    words = value if isinstance(value, list) else [value]
    _hold(name, len(words), "max_stops", settings, name)
    if any(isinstance(word, str) and len(word) > MOST_WORD_CHARACTERS for word in words):
        raise RequestError(
            f"{name}: a string has at most {MOST_WORD_CHARACTERS} characters here",
            param=name,
            status=HTTPStatus.UNPROCESSABLE_ENTITY,
        )


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _conversations(value: Any) -> int:
    return sum(isinstance(entry, list) for entry in value) if isinstance(value, list) else 0


def _all_conversations(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in ("messages", "input", "system"):
        if name in body:
            yield name, body[name]
    for place, scored in enumerate(body["inputs"] if _length(body.get("inputs")) else ()):
        if isinstance(scored, dict):
            yield f"inputs.{place}.messages", scored.get("messages")


def _entries(conversation: Any, most: int) -> int:
    # Messages, their parts and the parts of these; of a batch, its conversations too. Each is tried
    # against every kind that the API has, in one step of vLLM's.
    lists = [conversation] if isinstance(conversation, list) else []
    count = 0
    for entries in lists:  # which grow on the way
        count += len(entries)
        if count > most:
            break
        for entry in entries:
            nested = entry.values() if isinstance(entry, dict) else (entry,)
            lists.extend(child for child in nested if isinstance(child, list))
    return count


def _prompts(value: Any) -> int:
    # A list of integers is one prompt.
    return _length(value) if _length(value) and not isinstance(value[0], int) else 0


_COUNTS: tuple[tuple[str, str, Callable[[Any], int]], ...] = (
    ("messages", "max_inputs", _conversations),
    ("prompt", "max_inputs", _prompts),
    ("documents", "max_inputs", _length),
    ("tools", "max_tools", _length),
)
# Each is looked for in every token's text, or encoded before the engine sees the request.
_WORDS = ("stop", "stop_sequences", "bad_words")
_COUNTED = frozenset({"n", "best_of", "use_beam_search", *_WORDS, "prompt", "documents", "tools"})


def _hold(
    what: str, found: int, setting: str, settings: Settings, param: str | None = None
) -> None:
    if found > getattr(settings, setting):
        raise _beyond(what, found, setting, settings, HTTPStatus.UNPROCESSABLE_ENTITY, param)


def _beyond(
    what: str,
    found: object,
    setting: str,
    settings: Settings,
    status: int = HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    param: str | None = None,
) -> RequestError:
    bound = getattr(settings, setting)
    return RequestError(
        f"{what}: {found}, and at most {bound} here ({PREFIX}{setting.upper()})",
        param=param,
        status=status,
    )


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
    "chat_template": (_OWN_TEMPLATE, _given),
    "return_weight_versions": ("its spans would count the control token", _asked),
}
RESERVED: Mapping[str, tuple[str, frozenset[str]]] = {
    "chat_template_kwargs": ("an argument of the renderer", TEMPLATE_ARGUMENTS),
    "vllm_xargs": ("an argument of the engine's own", ENGINE_ARGUMENTS),
}
_NAMES = frozenset(COPIED)
_CHECKED = frozenset({*REFUSED, *RESERVED})


def refuse_fields(body: Mapping[str, Any]) -> None:
    """Refuses a body that holds one of them, or too long a name, whatever its route.

    Raises:
        RequestError: With the field's path and the reason.
    """
    for name in _NAMES.intersection(body):
        value = body[name]
        if isinstance(value, str) and len(value) > MOST_NAME_CHARACTERS:
            raise _too_long(name, len(value))
    if _CHECKED.isdisjoint(body):
        return
    for name, (reason, counts) in REFUSED.items():
        if name in body and counts(body[name]):
            raise _refused(name, reason)
    for name, (what, keys) in RESERVED.items():
        given = body.get(name)
        reserved = sorted(keys.intersection(given)) if isinstance(given, dict) else []
        if reserved:
            raise _refused(f"{name}.{reserved[0]}", f"it is {what}, and no request may set it")


def refuse_headers(headers: Headers) -> None:
    """Refuses headers that no tenant's request may bring, or too long a name in one.

    Raises:
        RequestError: With the header and the reason.
    """
    for name, value in headers.raw:
        if name == LOAD_HEADER:
            raise _refused(
                LOAD_HEADER.decode(),
                "the load is that of all callers; the operator reads it from /metrics",
            )
        if name == _PRIORITY and len(value) > MOST_DIGITS:
            raise _refused("X-Vllm-Priority", f"at most {MOST_DIGITS} digits")
        if len(value) > MOST_NAME_CHARACTERS and name in _COPIED_HEADERS:
            raise _too_long(_COPIED_HEADERS[name], len(value))


def _too_long(name: str, characters: int) -> RequestError:
    return _refused(
        name, f"it has {characters} characters, and at most {MOST_NAME_CHARACTERS} here"
    )


def _refused(path: str, reason: str) -> RequestError:
    return RequestError(f"{path}: {reason}", param=path, status=HTTPStatus.BAD_REQUEST)
