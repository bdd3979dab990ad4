"""Bounds of a request's grammar: all requests share the engine that follows it."""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from models.errors import NotAllowedError, RequestError
from server.settings import PREFIX

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

PARAM = "structured_outputs"
# Key of the limit in vLLM's `additional_config`.
LIMIT_KEY = "rheostat_max_grammar_s"
# vLLM's name of the grammar library that bounds each of its steps.
BOUNDED_BACKEND = "guidance"
# A stronger penalty excludes a forced token once it was written, so that the next one follows.
HARMLESS_REPETITION = (0.8, 1.5)
_DICTATE = ("logit_bias", "allowed_token_ids", "bad_words")
_KINDS = ("json", "regex", "choice", "grammar", "structural_tag")
# Keys of JSON schemas with a number of items or properties: llguidance writes one rule for each. It
# only counts the characters of a string, so the keys of lengths are left out.
_COUNTS = re.compile("(?:min|max)(?!Length)[A-Z]")
# Keys of JSON whose value is a pattern, or an object with patterns as keys.
_PATTERNS = re.compile("pattern|regex", re.IGNORECASE)
# {m}, {m,} and {m,n}, and Lark's ~m and ~m..n, without white space.
_REPEAT = re.compile(r"(.?)(?:\{([0-9]+)(?:,([0-9]*))?\}|~([0-9]+)(?:\.\.([0-9]+))?)")
# Ends of a group, of a pattern of Lark's, or of a repeat (an empty text: the repeat before). A
# count behind one of them multiplies the counts within.
_GROUP_ENDS = frozenset(["", *")}?*+/"])
_INLINE_SCHEMA = re.compile(r"%json\s*")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def check_grammar(
    asked: "StructuredOutputsParams",
    *,
    allowed: bool,
    most_bytes: int,
    most_count: int,
    choices: int = 1,
) -> None:
    """Checks a request's grammar, whichever of its fields asked for it.

    Args:
        asked: As vLLM read it.
        allowed: Whether the policy allows grammars.
        most_bytes: Longest grammar, as text.
        most_count: Largest sum of its item counts, times ``choices``; and largest product of one
            pattern's counts, where they may be nested.
        choices: For how many choices vLLM compiles the grammar anew.

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
    _check_counts(asked, most_count, choices)


def _check_counts(asked: "StructuredOutputsParams", most: int, choices: int) -> None:
    items = 0
    for part in _parts(asked):
        if isinstance(part, str):
            _hold(
                "counts of a pattern, multiplied where they may stand in each other",
                _repeats(part),
                most,
            )
        else:
            items += part
    _hold(f"numbers of items together, for each of {choices} choices", items * choices, most)


def _hold(what: str, found: int, most: int) -> None:
    if found > most:
        raise RequestError(
            "the grammar that structured_outputs, response_format or the tools ask for: "
            f"{what}: {found}, and at most {most} here ({PREFIX}MAX_GRAMMAR_COUNT)",
            param=PARAM,
            status=400,
        )


def _repeats(pattern: str) -> int:
    # An upper bound that needs no parser: a count behind a group or another count multiplies all
    # the others.
    alone, multiplying = 0, 1
    for before, *numbers in _REPEAT.findall("".join(pattern.split())):
        # More digits exceed every bound.
        count = max(int(number.lstrip("0")[:18] or 0) for number in numbers)
        if before in _GROUP_ENDS:
            multiplying *= max(1, count)
        else:
            alone += count
    return max(1, alone) * multiplying


def _parts(asked: "StructuredOutputsParams") -> Iterator[str | int]:
    """Yields the numbers of items and the patterns of a grammar."""
    if asked.regex is not None:
        yield asked.regex
    if asked.grammar is not None:
        yield from _parts_of_text(asked.grammar)
    for value in (asked.json, asked.structural_tag):
        if value is not None:
            yield from _parts_of_json(_read(value) if isinstance(value, str) else value)


def _parts_of_text(text: str) -> Iterator[str | int]:
    yield from text.splitlines()
    for found in _INLINE_SCHEMA.finditer(text):
        yield from _parts_of_json(_read(text, found.end()))


def _parts_of_json(schema: Any) -> Iterator[str | int]:
    left = [schema]
    for value in left:  # which grows on the way
        if isinstance(value, list):
            left.extend(value)
        elif isinstance(value, dict):
            left.extend(value.values())
            for key, child in value.items():
                yield from _parts_of_entry(key, child)


def _parts_of_entry(key: str, value: Any) -> Iterator[str | int]:
    if isinstance(value, int | float) and _COUNTS.match(key):
        yield int(min(max(value, 0), 2**63))
    elif isinstance(value, str) and key == "grammar":
        yield from _parts_of_text(value)
    elif isinstance(value, str) and _PATTERNS.search(key):
        yield value
    elif isinstance(value, dict) and _PATTERNS.search(key):
        yield from value


def _read(text: str, start: int = 0) -> Any:
    try:
        return _JSON.raw_decode(text.lstrip() if start == 0 else text, start)[0]
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "the grammar of structured_outputs holds invalid JSON, or nests too deeply",
            param=PARAM,
            status=400,
        ) from error


def check_dictation(params: "SamplingParams") -> None:
    """Checks that no sampling parameter can write an answer token by token, as a grammar can.

    Raises:
        NotAllowedError: One can.
    """
    low, high = HARMLESS_REPETITION
    found = [name for name in _DICTATE if getattr(params, name)]
    if not low <= params.repetition_penalty <= high:
        found.append("repetition_penalty")
    if found:
        raise NotAllowedError(
            f"{found[0]}: the policy allows no grammars, and this field can dictate an answer too",
            param=found[0],
        )


def grammar_failed() -> RequestError:
    """Returns the error of a request whose grammar the engine ended."""
    return RequestError(
        "no text follows the grammar that structured_outputs, response_format or the tools ask "
        f"for, or it takes more of the engine's time than {PREFIX}MAX_GRAMMAR_S allows",
        param=PARAM,
        status=400,
    )


def _size(value: Any) -> int:
    return len(value if isinstance(value, str) else json.dumps(value))
