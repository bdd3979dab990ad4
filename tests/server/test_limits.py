import json
import math
from typing import Any

import pytest

from models.errors import RequestError
from server.limits import check_head, read_json
from server.settings import Settings

SETTINGS = Settings(
    max_url_bytes=256,
    max_headers=16,
    max_header_bytes=1024,
    max_body_depth=8,
    max_messages=3,
    max_inputs=2,
    max_tools=1,
    max_choices=4,
)


def refused(raw: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read_json(raw, SETTINGS)
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
        b'{"a": -18446744073709551616}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
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
        b'{"a": 18446744073709551615, "b": -18446744073709551615}',
        b'{"a": 1e308, "b": 1e-999, "c": "1e999 and 99999999999999999999999"}',
        b'{"a": 1.7976931348623157e308}',
        b'{"a": "NaN", "b": "Infinity"}',
        b'\xef\xbb\xbf{"a": 1}',
        '{"a": "ä"}'.encode("utf-16"),
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
    wide = {**fits, "b": [[]] * 100}
    assert read_json(json.dumps(wide).encode(), SETTINGS) == wide
    error = refused(json.dumps({"a": fits}).encode())
    assert error.status == 422
    assert "at most 8 here (RHEOSTAT_MAX_BODY_DEPTH)" in error.message


def test_strings_are_bounded_wherever_they_stand() -> None:
    bounded = Settings(max_body_strings=64)
    fits = {"a": ['a "word"'] * 61, "b": {"c": 5}}
    assert read_json(json.dumps(fits).encode(), bounded) == fits
    for beyond in ({**fits, "d": ""}, {"a": ["\\"] * 140}):
        with pytest.raises(RequestError, match=r"at most 64 here \(RHEOSTAT_MAX_BODY_STR") as told:
            read_json(json.dumps(beyond).encode(), bounded)
        assert told.value.status == 422


@pytest.mark.parametrize(
    ("fits", "beyond", "param", "setting"),
    [
        ({"messages": [{}] * 3}, {"messages": [{}] * 4}, "messages", "MAX_MESSAGES"),
        ({"input": [{}] * 3}, {"input": [{}] * 4}, "input", "MAX_MESSAGES"),
        ({"messages": [[{}], []]}, {"messages": [[{}, {}], [{}]]}, "messages", "MAX_MESSAGES"),
        ({"messages": [[], []]}, {"messages": [[], [], []]}, "messages", "MAX_INPUTS"),
        ({"prompt": ["a"] * 2}, {"prompt": ["a"] * 3}, "prompt", "MAX_INPUTS"),
        ({"prompt": [1] * 99}, {"prompt": [[1], [2], [3]]}, "prompt", "MAX_INPUTS"),
        ({"documents": [{}] * 2}, {"documents": [{}] * 3}, "documents", "MAX_INPUTS"),
        ({"tools": [{}]}, {"tools": [{}, {}]}, "tools", "MAX_TOOLS"),
        ({"n": 4}, {"n": 5}, "n", "MAX_CHOICES"),
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
    with pytest.raises(RequestError, match="half of a surrogate pair") as raised:
        read_json(raw, Settings())
    assert raised.value.status == 400


def test_whole_surrogate_pair_is_a_character() -> None:
    assert read_json(b'{"stop": "\\ud83d\\ude00"}', Settings()) == {"stop": "\U0001f600"}
