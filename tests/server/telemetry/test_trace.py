import asyncio
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from models.controls import Controls, Rule
from models.errors import ConfigError
from server.context import Decision, DecisionContext
from server.dials.board import Resolution
from server.dials.protocol import RefusalOptions, parse_options
from server.settings import Settings
from server.telemetry.trace import MOST_WAITING, STANDARD_OUTPUT, DecisionTrace, Scored, Traced
from server.web.errors import failure
from server.web.limits import MOST_NAME_CHARACTERS
from tests.server.manifests import MANIFEST

NAMES = MANIFEST.names
NOON = datetime(2026, 1, 2, 12, 0, 0, 5000, tzinfo=UTC)
DIALS = Resolution(
    Controls(Rule.GREEDY, (1.5, -math.inf), (True, True)), clamped=(("safety", "floor"),)
)


def traced(
    decisions: dict[tuple[int, int], Decision] | None = None, asked: RefusalOptions | None = None
) -> Traced:
    context = DecisionContext(DIALS, policy="desk", request_ids=["chatcmpl-1", "chatcmpl-2"])
    context.decisions.update({(0, 0): Decision(0)} if decisions is None else decisions)
    return Traced(NOON, "acme", "/v1/chat/completions", asked or RefusalOptions(), context)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lost() -> float:
    return REGISTRY.get_sample_value("rheostat_trace_lost_total", {"model_name": ""}) or 0.0


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


def test_line_says_who_asked_what_and_what_became_of_it() -> None:
    value = {"policy": "desk", "categories": {"safety": "never", "humanizing": {"rate": 0.3}}}
    asked = parse_options({**value, "decision": "sample", "false_refusal_rate": 0.1})
    assert list(traced(asked=asked).lines(NAMES)) == [
        {
            "time": "2026-01-02T12:00:00.005+00:00",
            "request_id": "chatcmpl-1",
            "choice": 0,
            "route": "/v1/chat/completions",
            "tenant": "acme",
            "policy": "desk",
            "enforce": True,
            "asked": {
                "policy": "desk",
                "decision": "sample",
                "false_refusal_rate": 0.1,
                "categories": {"safety": {"bias": "never"}, "humanizing": {"rate": 0.3}},
            },
            "effective": {"decision": "greedy", "bias": {"safety": 1.5, "humanizing": "never"}},
            "clamped": {"safety": "floor"},
            "decision": "refuse",
            "category": "safety",
        }
    ]


def test_policy_that_is_not_enforced_tells_what_it_would_have_refused() -> None:
    entry = traced({(0, 0): Decision(None, shadow=1), (0, 1): Decision(None)})
    entry.context.enforce = False
    written = list(entry.lines(NAMES))
    assert [(line["decision"], line["category"]) for line in written] == [
        ("would_refuse", "humanizing"),
        ("respond", None),
    ]
    assert all(line["enforce"] is False for line in written)


def test_every_choice_of_every_call_has_a_line() -> None:
    decisions = {(1, 0): Decision(None), (0, 1): Decision(1), (0, 0): Decision(0)}
    written = list(traced(decisions).lines(NAMES))
    assert [(line["request_id"], line["choice"], line["category"]) for line in written] == [
        ("chatcmpl-1", 0, "safety"),
        ("chatcmpl-1", 1, "humanizing"),
        ("chatcmpl-2", 0, None),
    ]
    assert [line["decision"] for line in written] == ["refuse", "refuse", "respond"]
    assert all(line["asked"] == {} for line in written)


def test_dials_that_json_has_no_number_for_are_words() -> None:
    asked = parse_options({"categories": {"safety": {"bias": 1e308}, "humanizing": "always"}})
    (line,) = traced(asked=asked).lines(NAMES)
    json.loads(json.dumps(line, allow_nan=False))
    assert line["asked"]["categories"]["humanizing"] == {"bias": "always"}


def test_lines_are_written_soon_and_the_rest_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"from": "before"}\n')
    trace = DecisionTrace(path, NAMES)

    async def serve() -> None:
        async with trace.writing(every_s=0.005):
            trace.add(traced())
            await until(lambda: len(lines(path)) == 2)
            trace.add(traced())
            trace.add(traced({}))  # nothing was decided
        assert len(lines(path)) == 3

    asyncio.run(serve())


def test_file_may_be_rotated_away(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = DecisionTrace(path, NAMES)

    async def serve() -> None:
        async with trace.writing(every_s=0.005):
            trace.add(traced())
            await until(lambda: len(lines(path)) == 1)
            path.rename(tmp_path / "old.jsonl")
            trace.add(traced())
            await until(path.exists)
        assert len(lines(path)) == 1

    asyncio.run(serve())


def test_folder_that_goes_away_loses_lines_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    trace = DecisionTrace(folder / "trace.jsonl", NAMES)
    before = lost()

    async def serve() -> None:
        async with trace.writing(every_s=0.005):
            folder.rename(tmp_path / "elsewhere")
            trace.add(traced())
            await until(lambda: lost() == before + 1)
            (tmp_path / "elsewhere").rename(folder)
            trace.add(traced())
        assert len(lines(folder / "trace.jsonl")) == 1

    asyncio.run(serve())
    assert "1 lines of" in caplog.text


def test_what_waits_is_bounded_and_the_rest_counted(tmp_path: Path) -> None:
    trace = DecisionTrace(tmp_path / "trace.jsonl", NAMES)
    before = lost()
    entry = traced()
    for _ in range(MOST_WAITING + 3):
        trace.add(entry)
    assert lost() == before + 3


def test_dash_is_the_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    trace = DecisionTrace(STANDARD_OUTPUT, NAMES)

    async def serve() -> None:
        async with trace.writing():
            trace.add(traced())

    asyncio.run(serve())
    assert json.loads(capsys.readouterr().out)["tenant"] == "acme"


def test_file_that_cannot_be_written_is_found_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^RHEOSTAT_TRACE_FILE: .*cannot be written"):
        DecisionTrace(tmp_path / "nowhere" / "trace.jsonl", NAMES)


def test_scoring_is_one_line_without_its_prompts() -> None:
    asked = parse_options({"categories": {"safety": "never"}})
    (line,) = Scored(NOON, "acme", "/v1/refusal/score", "desk", asked, DIALS, 3, 2).lines(NAMES)
    assert line == {
        "time": "2026-01-02T12:00:00.005+00:00",
        "request_id": None,
        "route": "/v1/refusal/score",
        "tenant": "acme",
        "policy": "desk",
        "asked": {"categories": {"safety": {"bias": "never"}}},
        "effective": {"decision": "greedy", "bias": {"safety": 1.5, "humanizing": "never"}},
        "clamped": {"safety": "floor"},
        "decision": "scored",
        "inputs": 3,
        "refused": 2,
    }


def test_denials_are_counted_for_a_while_and_written_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = DecisionTrace(path, NAMES)
    told = failure(401, "no key", None, "invalid_api_key")

    async def serve() -> None:
        async with trace.writing(every_s=0.005):
            for _ in range(1000):
                trace.denials.add(told, "/v1/models", None, None)
            await until(lambda: bool(lines(path)))
            trace.denials.add(told, "/v1/models", "acme", None)

    asyncio.run(serve())
    first, second = lines(path)
    assert (first["tenant"], first["count"]) == (None, 1000)
    assert (second["tenant"], second["count"]) == ("acme", 1)


def test_lines_of_the_largest_request_are_bounded() -> None:
    longest = {"safety": {"bias": -1.7976931348623157e308}, "humanizing": {"rate": 1 / 3}}
    asked = parse_options({"categories": longest, "false_refusal_rate": 1 / 3, "report": True})
    most = Settings().max_choices
    entry = traced({(call, 0): Decision(0) for call in range(most)}, asked)
    entry.context.request_ids = [f"chatcmpl-{'a' * MOST_NAME_CHARACTERS}-{n}" for n in range(most)]
    written = [json.dumps(line) for line in entry.lines(NAMES)]
    assert len(written) == most
    assert max(map(len, written)) < 1024


def test_full_file_is_renamed_and_only_so_many_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"

    async def write() -> None:
        trace = DecisionTrace(path, NAMES, max_bytes=900, files=2)
        for choice in range(8):
            async with trace.writing():
                trace.add(traced({(0, choice): Decision(0)}))

    asyncio.run(write())
    # A line has some 380 bytes, so a file holds two.
    kept = [tmp_path / "trace.jsonl.2", tmp_path / "trace.jsonl.1", path]
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert [[line["choice"] for line in lines(file)] for file in kept] == [[2, 3], [4, 5], [6, 7]]


def test_file_that_cannot_be_renamed_fails_no_request(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    trace = DecisionTrace(path, NAMES, max_bytes=1, files=1)
    (tmp_path / "trace.jsonl.1" / "in the way").mkdir(parents=True)

    async def write() -> None:
        for _ in range(2):
            async with trace.writing():
                trace.add(traced())

    before = lost()
    asyncio.run(write())
    assert (len(lines(path)), lost() - before) == (1, 1)
