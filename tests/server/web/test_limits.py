import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from models.errors import RequestError
from server.settings import Settings
from server.web.limits import MOST_WORD_CHARACTERS, check_head, read_json, write_json

SETTINGS = Settings(
    max_url_bytes=256,
    max_headers=16,
    max_header_bytes=1024,
    max_body_depth=8,
    max_messages=3,
    max_inputs=2,
    max_tools=1,
    max_stops=2,
    max_choices=4,
)


def refused(raw: bytes, settings: Settings = SETTINGS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_json(raw, settings)
    return caught.value


def head(path: str = "/", query: bytes = b"", headers: Any = ()) -> RequestError | None:
    scope = {"path": path, "raw_path": path.encode(), "query_string": query, "headers": headers}
    try:
        check_head(scope, SETTINGS)
    except RequestError as error:
        return error
    return None


def test_address_is_bounded_with_its_query() -> None:
    assert head("/" * 128, b"q" * 128) is None
    error = head("/" * 128, b"q" * 129)
    assert error is not None
    assert error.status == 414
    assert error.message == "the address: 257, and at most 256 here (RHEOSTAT_MAX_URL_BYTES)"


def test_headers_are_bounded_in_number_and_size() -> None:
    assert head(headers=[(b"a", b"b")] * 16) is None
    many = head(headers=[(b"a", b"b")] * 17)
    assert many is not None
    assert many.status == 413
    assert "RHEOSTAT_MAX_HEADERS" in many.message
    assert head(headers=[(b"a", b"b" * 1023)]) is None
    large = head(headers=[(b"a", b"b" * 1024)])
    assert large is not None
    assert large.status == 413
    assert "RHEOSTAT_MAX_HEADER_BYTES" in large.message


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b" ",
        b"[]",
        b"null",
        b"5",
        b'"x"',
        b"a=b&c=d",
        b"{}{}",
        b"\x1f\x8b\x08\x00",
        b"\xff",
        b"{'a': 1}",
        b'{"a": 1,}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": -1e+999}',
        b'{"a": ' + b"9" * 400 + b".0}",
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": 18446744073709551616}',
        b'{"a": -9223372036854775809}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": "ä"}'.encode("utf-16"),
        '{"a": "ä"}'.encode("utf-32"),
        b"[" * 10_000,
        b'{"a":' * 10_000,
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_what_is_no_usable_object_is_400(raw: bytes) -> None:
    error = refused(raw)
    assert error.status == 400
    assert len(error.message) < 200


@pytest.mark.parametrize(
    "raw",
    [
        b"{}",
        b'{"a": 18446744073709551615, "b": -9223372036854775808}',
        b'{"a": 1e308, "b": 1e-999, "c": "1e999 and 99999999999999999999999"}',
        b'{"a": 1.7976931348623157e308}',
        b'{"a": "NaN", "b": "Infinity"}',
        b'{"a": 1, "a": 2}',
    ],
)
def test_what_json_allows_is_read_as_vllm_reads_it(raw: bytes) -> None:
    assert read_json(raw, SETTINGS) == json.loads(raw)
    assert all(not isinstance(v, float) or math.isfinite(v) for v in json.loads(raw).values())


def nested(depth: int) -> dict[str, Any]:
    """Returns a body whose innermost container stands at a depth; the body itself is at 1."""
    value: Any = {} if depth % 2 else []
    for level in range(depth - 1):
        value = {"a": value} if level % 2 else [value, 1]
    return {"a": value[0]} if isinstance(value, list) else value


def test_depth_is_bounded_however_wide_the_body_is() -> None:
    fits = nested(8)
    wide = {**fits, "b": [[]] * 100, "c": "[" * 100 + '\\"{'}
    assert read_json(json.dumps(wide).encode(), SETTINGS) == wide
    for beyond in ({"a": fits}, {"a": fits, "b": [[]] * 100}):
        error = refused(json.dumps(beyond).encode())
        assert error.status == 422
        assert "at most 8 here (RHEOSTAT_MAX_BODY_DEPTH)" in error.message


BOUNDED = Settings(max_body_strings=64, max_body_values=256)


@pytest.mark.parametrize(
    ("fits", "beyond", "setting"),
    [
        ({"a": ['a "word"'] * 61, "b": {"c": 5}}, {"a": [""] * 64}, "STRINGS"),
        ({"a": ["\\"] * 63}, {"a": ["\\"] * 64}, "STRINGS"),
        ({"a": ['\\"'] * 63}, {"a": ['\\"'] * 64}, "STRINGS"),
        ({"a": ['[{,:"' * 99]}, {str(key): 1 for key in range(65)}, "STRINGS"),
        ({"a": [[]] * 62}, {"a": [[]] * 63}, "STRINGS"),
        ({"a": [{}] * 62}, {"a": [{}] * 63}, "STRINGS"),
        ({"a": [1] * 255}, {"a": [1] * 256}, "VALUES"),
        ({"a": json.dumps([1] * 256)}, {"a": json.dumps([1] * 257)}, "VALUES"),
        ({"a": [1.5, True, None] * 85}, {"a": [1.5, True, None] * 86}, "VALUES"),
    ],
    ids=lambda case: str(case)[:24],
)
def test_values_are_bounded_wherever_they_stand(
    fits: dict[str, Any], beyond: dict[str, Any], setting: str
) -> None:
    assert read_json(json.dumps(fits).encode(), BOUNDED) == fits
    error = refused(json.dumps(beyond).encode(), BOUNDED)
    assert error.status == 422
    assert f"(RHEOSTAT_MAX_BODY_{setting})" in error.message


@pytest.mark.parametrize(
    ("fits", "beyond", "param", "setting"),
    [
        ({"messages": [{}] * 3}, {"messages": [{}] * 4}, "messages", "MAX_MESSAGES"),
        ({"input": [{}] * 3}, {"input": [{}] * 4}, "input", "MAX_MESSAGES"),
        ({"messages": [[{}], []]}, {"messages": [[{}, {}], [{}]]}, "messages", "MAX_MESSAGES"),
        (
            {"messages": [[]]},
            {"messages": [{"content": ["a", "b", "c"]}]},
            "messages",
            "MAX_MESSAGES",
        ),
        (
            {"input": [{"content": [{"content": []}]}, {"summary": {"a": [1, 2]}}]},
            {"input": [{"content": [{"content": [1, 2]}]}]},
            "input",
            "MAX_MESSAGES",
        ),
        (
            {"inputs": [{"messages": [{}] * 3}] * 5},
            {"inputs": [{"messages": [{}]}, {"messages": [{}] * 4}]},
            "inputs.1.messages",
            "MAX_MESSAGES",
        ),
        ({"messages": [[], []]}, {"messages": [[], [], []]}, "messages", "MAX_INPUTS"),
        ({"prompt": ["a"] * 2}, {"prompt": ["a"] * 3}, "prompt", "MAX_INPUTS"),
        ({"prompt": [1] * 99}, {"prompt": [[1], [2], [3]]}, "prompt", "MAX_INPUTS"),
        ({"documents": [{}] * 2}, {"documents": [{}] * 3}, "documents", "MAX_INPUTS"),
        ({"tools": [{}]}, {"tools": [{}, {}]}, "tools", "MAX_TOOLS"),
        ({"n": 4}, {"n": 5}, "n", "MAX_CHOICES"),
        ({"n": 2, "prompt": ["a", "b"]}, {"n": 3, "prompt": ["a", "b"]}, "n", "MAX_CHOICES"),
        ({"n": 2, "messages": [[], []]}, {"n": 3, "messages": [[], []]}, "n", "MAX_CHOICES"),
        ({"best_of": 4}, {"best_of": 5, "use_beam_search": True}, "n", "MAX_CHOICES"),
        ({"stop": "ab"}, {"stop": ["a", "b", "c"]}, "stop", "MAX_STOPS"),
        ({"bad_words": ["a", "b"]}, {"bad_words": ["a"] * 3}, "bad_words", "MAX_STOPS"),
        ({"n": "x"}, {"n": "5"}, "n", "MAX_CHOICES"),
        ({"n": 4.5}, {"n": 5.0}, "n", "MAX_CHOICES"),
    ],
)
def test_numbers_are_bounded_and_the_bound_is_named(
    fits: dict[str, Any], beyond: dict[str, Any], param: str, setting: str
) -> None:
    assert read_json(json.dumps(fits).encode(), SETTINGS) == fits
    error = refused(json.dumps(beyond).encode())
    assert (error.status, error.param) == (422, param)
    assert f"RHEOSTAT_{setting})" in error.message


@pytest.mark.parametrize(
    "raw",
    [
        b'{"stop": "\\ud800"}',
        b'{"stop": ["\\uDFFF x"]}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\xff"}',
    ],
)
def test_half_a_surrogate_pair_is_400(raw: bytes) -> None:
    error = refused(raw)
    assert error.status == 400
    assert error.message.startswith("the body must be a JSON object in UTF-8: ")


def test_whole_surrogate_pair_is_a_character() -> None:
    assert read_json(b'{"stop": "\\ud83d\\ude00"}', Settings()) == {"stop": "\U0001f600"}


def test_prompts_without_n_count_as_choices() -> None:
    many = {"prompt": ["a"] * 5}
    error = refused(json.dumps(many).encode(), Settings(max_choices=4))
    assert (error.status, error.param) == (422, "n")
    assert (
        error.message
        == "n times the number of prompts: 5, and at most 4 here (RHEOSTAT_MAX_CHOICES)"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["a"] * 9, "n": "9" * 4299},
        {"use_beam_search": True, "logprobs": 1, "max_tokens": "9" * 4299},
    ],
)
def test_number_that_python_does_not_write_is_beyond_its_bound(fields: dict[str, Any]) -> None:
    error = refused(json.dumps(fields).encode(), Settings())
    assert error.status == 422
    assert len(error.message) < 200


SMALL = Settings(max_repeated_bytes=1024, max_logprobs=200)
KIB = {"vllm_xargs": {"a": "b" * (512 - len('{"a":""}'))}}


@pytest.mark.parametrize(
    ("fits", "repeated"),
    [
        ({**KIB, "n": 2}, {**KIB, "n": 3}),
        ({**KIB, "n": 2}, {**KIB, "best_of": 3}),
        ({**KIB, "prompt": ["a", "b"]}, {**KIB, "prompt": ["a", "b", "c"]}),
        ({**KIB, "prompt": [1, 2, 3]}, {**KIB, "prompt": ["a", "b"], "n": 2}),
        ({**KIB, "messages": [[], []]}, {**KIB, "messages": [[], [], []]}),
        ({**KIB, "n": 2, "max_tokens": 5}, {**KIB, "n": 2, "stop": "a"}),
        ({"vllm_xargs": KIB, "tools": [{}] * 9}, {"vllm_xargs": KIB, "n": 2}),
        (
            {**KIB, "n": 2, "tools": [{"a": "b" * 999}], "tool_choice": None},
            {**KIB, "n": 2, "tools": [{"a": "b" * 9}], "tool_choice": {"type": "function"}},
        ),
        *(
            ({**KIB, "n": 2, name: "a" * 5000}, {**KIB, "n": 2, "else": "a"})
            for name in ("messages", "input", "prompt", "system", "instructions", "metadata")
        ),
    ],
    ids=lambda body: str({name: str(value)[:20] for name, value in body.items()}),
)
def test_fields_that_choices_and_prompts_repeat_are_bounded(
    fits: dict[str, Any], repeated: dict[str, Any]
) -> None:
    assert read_json(json.dumps(fits).encode(), SMALL) == fits
    error = refused(json.dumps(repeated).encode(), SMALL)
    assert (error.status, error.param) == (422, "vllm_xargs")
    assert "choices (n times the prompts): " in error.message
    assert "at most 1024 here (RHEOSTAT_MAX_REPEATED_BYTES)" in error.message


BEAMS = {"use_beam_search": True, "n": 3, "max_tokens": 9, "logprobs": True}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, None),
        ({"max_tokens": 10}, 210),
        ({"max_completion_tokens": 10}, 210),
        ({"max_tokens": None}, 4200),
        ({"max_tokens": 10, "logprobs": 0}, 210),
        ({"max_tokens": 10, "use_beam_search": "true"}, 210),
        ({"max_tokens": 10, "n": 4}, 360),
        ({"max_tokens": 10, "logprobs": False}, None),
        ({"max_tokens": 10, "logprobs": None}, None),
        ({"max_tokens": 10, "use_beam_search": False}, None),
    ],
)
def test_log_probabilities_of_beams_are_bounded(changed: dict[str, Any], found: int | None) -> None:
    body = {**BEAMS, **changed}
    if found is None:
        assert read_json(json.dumps(body).encode(), SMALL) == body
        return
    error = refused(json.dumps(body).encode(), SMALL)
    assert (error.status, error.param) == (422, "logprobs")
    assert f": {found}, and at most 200 here (RHEOSTAT_MAX_LOGPROBS)" in error.message


@pytest.mark.parametrize("name", ["stop", "stop_sequences", "bad_words"])
def test_length_of_a_stop_string_is_bounded(name: str) -> None:
    longest = "a" * MOST_WORD_CHARACTERS
    for fits in (longest, ["b", longest]):
        assert read_json(json.dumps({name: fits}).encode(), SETTINGS) == {name: fits}
    for beyond in (longest + "a", ["b", longest + "a"]):
        error = refused(json.dumps({name: beyond}).encode())
        assert (error.status, error.param) == (422, name)


# Pieces that parsers disagree on, and those that hold a JSON text together.
PIECES = [
    *(
        '{"a":',
        '{"b": ',
        "[",
        "]",
        "}",
        ",",
        ":",
        '"',
        "\\",
        " ",
        "\t",
        "\n",
        "\x0b",
        "\x00",
        "\xa0",
    ),
    *("0", "-0", "01", "1.", ".5", "1e5", "1E+400", "-1e-400", "2.2250738585072011e-308"),
    *("1.7976931348623157e308", "5e-324", "0.1", "123456789012345678901234567890.5"),
    *("9223372036854775807", "-9223372036854775809", "18446744073709551615", "1" * 40),
    *("true", "null", "NaN", "Infinity", "-Infinity", "True", "nan", "'a'", "/**/"),
    *('"ä"', '"\\u00e4"', '"\\ud83d\\ude00"', '"\\ud83d"', '"\\ude00\\ud83d"', '"\\/"', '"\\x"'),
    *('"\\u0000"', '"\x7f"', '"\\\\"', '"\\""', '"NaN"', '"[{,:"', '"\U0001f600"'),
]


def odd_bodies(count: int) -> Iterator[bytes]:
    draw = random.Random(12)
    for _ in range(count):
        inner = [draw.choice(PIECES) for _ in range(draw.randrange(1, 5))]
        whole = draw.choice(
            [
                '{"a": ' + ", ".join(inner) + "}",
                '{"a": [' + ", ".join(inner) + "]}",
                "{" + ", ".join(f'"{draw.choice("aab")}": {piece}' for piece in inner) + "}",
                '{"a"' + "".join(inner) + "}",
                "".join(inner),
            ]
        )
        raw = whole.encode(draw.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16", "utf-32"]))
        if draw.random() < 0.1:
            place = draw.randrange(len(raw))
            raw = raw[:place] + bytes([draw.randrange(256)]) + raw[place + 1 :]
        yield raw


def test_what_vllm_reads_is_what_was_parsed_and_what_python_parses() -> None:
    settings = Settings()
    accepted = 0
    for raw in odd_bodies(20_000):
        with suppress(RequestError):
            body = read_json(raw, settings)
            accepted += 1
            # As text: 1 is 1.0 and True to Python's ==, and 0.0 is -0.0.
            assert repr(body) == repr(json.loads(raw)) == repr(json.loads(write_json(body))), raw
    assert accepted > 1000


def test_many_values_are_counted_before_they_are_made() -> None:
    most = 2**22 // 2 - 10
    bodies = [
        b'{"a":[' + b",".join([b"1"] * most) + b"]}",
        b'{"a":[' + b",".join([b"[]"] * (most // 2)) + b"]}",
        b'{"a":[' + b",".join([b'""'] * (most // 2)) + b"]}",
        b"[" * (2 * most),
    ]
    for raw in bodies:
        started_s = time.process_time()
        assert refused(raw, Settings()).status in (400, 422)
        assert time.process_time() - started_s < 0.5  # some 10 ms, but for a busy machine
