import asyncio
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from models.errors import ConfigError
from models.histogram import BINS, load_margins
from server.telemetry.recorder import MarginRecorder

NAMES = ("safety", "humanizing")
WEIGHTS = "a" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "margins.json"


def opened(path: Path, *, share: float = 1.0, weights: str = WEIGHTS) -> MarginRecorder:
    return MarginRecorder(path, share, NAMES, weights)


def test_margins_are_counted_by_policy_category_and_bin(path: Path) -> None:
    recorder = opened(path)
    recorder.add("default", (0.1, -100.0))
    recorder.add("default", (0.2, 100.0))
    recorder.add("desk", (-0.1, 0.0))
    recorder.flush()
    recorded = load_margins(path)
    assert recorded.weights_sha256 == WEIGHTS
    assert {name: policy.rows for name, policy in recorded.policies.items()} == {
        "default": 2,
        "desk": 1,
    }
    safety = recorded.policies["default"].counts["safety"]
    # 0.1 and 0.2 lie in [0, 0.25): the 81st of the edges -20, -19.75, ... is 0.
    assert [i for i, count in enumerate(safety) if count] == [81]
    assert safety[81] == 2
    humanizing = recorded.policies["default"].counts["humanizing"]
    assert (humanizing[0], humanizing[BINS - 1]) == (1, 1)


def test_file_holds_no_text_and_is_there_from_the_start(path: Path) -> None:
    opened(path)
    assert load_margins(path).policies == {}


def test_counts_go_on_after_a_restart_of_the_same_weights(path: Path) -> None:
    first = opened(path)
    first.add("default", (0.0, 0.0))
    first.flush()
    since = load_margins(path).since
    second = opened(path)
    second.add("default", (0.0, 0.0))
    second.flush()
    assert load_margins(path).policies["default"].rows == 2
    assert load_margins(path).since == since


def test_other_weights_begin_anew(path: Path) -> None:
    first = opened(path)
    first.add("default", (0.0, 0.0))
    first.flush()
    opened(path, weights="b" * 64)
    assert load_margins(path).policies == {}


@pytest.mark.parametrize("content", [b"", b"{}", b"my thesis"])
def test_file_that_is_something_else_is_not_overwritten(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"margins\.json"):
        opened(path)
    assert path.read_bytes() == content


def test_folder_that_is_not_there_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^RHEOSTAT_RECORD_FILE: .*nowhere"):
        opened(tmp_path / "nowhere" / "margins.json")


def test_share_of_the_requests_is_drawn(path: Path) -> None:
    recorder = MarginRecorder(path, 0.1, NAMES, WEIGHTS, seed=0)
    drawn = [recorder.draws_next() for _ in range(4000)]
    # Four standard deviations of 4,000 draws are 76.
    assert abs(sum(drawn) - 400) < 76
    assert any(one and other for one, other in pairwise(drawn)), "every tenth is no draw"
    for share in (0.0, 1.0):
        ends = opened(path, share=share)
        assert {ends.draws_next() for _ in range(100)} == {bool(share)}


def test_counts_are_written_while_traffic_goes_on_and_at_the_end(path: Path) -> None:
    recorder = opened(path)

    async def serve() -> None:
        async with recorder.flushing(every_s=0.01):
            recorder.add("default", (0.0, 0.0))
            await until(lambda: rows(path) == 1)
            recorder.add("default", (0.0, 0.0))
        assert rows(path) == 2

    asyncio.run(serve())


def test_folder_that_goes_away_ends_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = opened(path)
    elsewhere = path.parent.with_name("elsewhere")

    async def serve() -> None:
        async with recorder.flushing(every_s=0.01):
            path.parent.rename(elsewhere)
            recorder.add("default", (0.0, 0.0))
            await until(lambda: "cannot be written" in caplog.text)
            elsewhere.rename(path.parent)
            await until(lambda: rows(path) == 1)

    asyncio.run(serve())


def rows(path: Path) -> int:
    policies = load_margins(path).policies
    return policies["default"].rows if policies else 0


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)
