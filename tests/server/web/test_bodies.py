import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.datastructures import Headers

from models.errors import RequestError
from server.dials.protocol import RefusalOptions, parse_options
from server.web.bodies import LARGE_BYTES, aside, encode, flag, with_header_dials
from tests.server.boards import board


@pytest.mark.parametrize(("size", "beside"), [(LARGE_BYTES - 1, False), (LARGE_BYTES, True)])
def test_work_on_a_large_body_is_done_beside_the_event_loop(size: int, beside: bool) -> None:
    async def thread() -> threading.Thread:
        return await aside(size, threading.current_thread)

    assert (asyncio.run(thread()) is not threading.current_thread()) == beside


ON: list[Any] = [True, 1, "true", "yes", "on", 1.0]
OFF: list[Any] = [False, 0, "false", None, "nonsense", [], 2]


@pytest.mark.parametrize(
    ("value", "expected"), [*((value, True) for value in ON), *((value, False) for value in OFF)]
)
def test_flag_is_read_as_vllm_reads_it(value: Any, expected: bool) -> None:
    assert flag({"echo": value}, "echo") is expected
    assert flag({}, "echo") is False


def asked(headers: Sequence[tuple[str, str]], body: dict[str, Any]) -> RefusalOptions:
    """Returns what a request asks for with its headers and its body."""
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    return parse_options(with_header_dials(body, Headers(raw=raw))["refusal"])


@pytest.mark.parametrize(
    ("text", "written"), [("ä", '"ä"'), ("\ud800", '"\\ud800"')], ids=["whole", "half a pair"]
)
def test_text_is_utf_8_unless_it_holds_half_a_surrogate_pair(text: str, written: str) -> None:
    assert encode(text) == written.encode()


def test_header_form_is_the_refusal_object() -> None:
    header = "safety=rate:0.25, humanizing=false_refusal_rate:0.05"
    dials: dict[str, Any] = {"safety": {"rate": 0.25}, "humanizing": {"false_refusal_rate": 0.05}}
    assert asked([("X-Refusal", header)], {}) == parse_options({"categories": dials})
    several = [("X-Refusal", "safety=always"), ("X-Refusal", "humanizing=bias:-2")]
    dials = {"safety": "always", "humanizing": {"bias": -2}}
    assert asked(several, {}) == parse_options({"categories": dials})
    body = {"refusal": {"categories": {"safety": 0.3}}}
    assert asked([("X-Refusal-Policy", "a")], body).policy == "a"


@pytest.mark.parametrize(
    ("headers", "body", "param"),
    [
        ([("X-Refusal", "safety")], {}, "X-Refusal"),
        ([("X-Refusal", "")], {}, "X-Refusal"),
        ([("X-Refusal", "safety=1,safety=0")], {}, "X-Refusal"),
        ([("X-Refusal", "safety=0.5"), ("X-Refusal", "safety=0")], {}, "X-Refusal"),
        ([("X-Refusal", "safety=0.5")], {"refusal": {}}, "X-Refusal"),
        ([("X-Refusal", "safety=nan")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "safety=1.2")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "safety=rate:0.3")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "safety=rate:1.3")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "safety=false_refusal_rate:x")], {}, "refusal.categories.safety"),
        ([("X-Refusal", "bogus=0.3")], {}, "refusal.categories.bogus"),
        ([("X-Refusal-Policy", "a"), ("X-Refusal-Policy", "a")], {}, "X-Refusal-Policy"),
        ([("X-Refusal-Policy", "a")], {"refusal": {"policy": "a"}}, "X-Refusal-Policy"),
        ([("X-Refusal-Policy", "a")], {"refusal": 5}, "refusal"),
    ],
)
def test_wrong_header_names_its_place(
    headers: Sequence[tuple[str, str]], body: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:  # a rate needs a calibration, which is not loaded
        board().resolve(asked(headers, body))
    assert (caught.value.status, caught.value.param) == (422, param)
