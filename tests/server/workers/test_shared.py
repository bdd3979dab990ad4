import json
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from socket import socket
from typing import Any

import pytest

from models.histogram import load_margins
from server.workers.shared import HttpProcess, SharedCounts
from tests.server.workers.counting import (
    ROUNDS,
    come_and_go,
    enter_for_ever,
    record,
    write_trace,
)

SPAWN = multiprocessing.get_context("spawn")
MOST = 7


@pytest.fixture
def shared() -> HttpProcess:
    return HttpProcess(socket(), None, SharedCounts(SPAWN, 1000), SPAWN.RLock())


def run_two(work: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
    """Runs it in two processes at once."""
    processes = [SPAWN.Process(target=work, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_counts_of_one_process_are_as_without_others() -> None:
    counts = SharedCounts(SPAWN, 2)
    with counts.locked():
        counts.add("a", 2)
        counts.add(None, 1)
    assert (counts.total, counts.of("a"), counts.of(None), counts.of("b")) == (3, 2, 1, 0)
    with counts.locked():
        counts.add("a", -2)
        counts.add("b", 5)
    assert (counts.total, counts.of("a"), counts.of(None), counts.of("b")) == (6, 0, 1, 5)


def test_bound_of_a_tenant_is_reached_and_not_passed_by_two_processes(shared: HttpProcess) -> None:
    tenants = ["acme", "shop", "clinic"]
    run_two(enter_for_ever, *[(shared, tenants, MOST)] * 2)
    assert shared.counts is not None
    assert [shared.counts.of(name) for name in tenants] == [MOST] * 3
    assert shared.counts.total == 3 * MOST


def test_nothing_is_left_of_what_has_gone(shared: HttpProcess) -> None:
    run_two(come_and_go, (shared, "a"), (shared, "b"))
    assert shared.counts is not None
    assert shared.counts.total == 0
    assert sum(shared.counts.of(f"{name}{turn}") for name in "ab" for turn in range(ROUNDS)) == 0


def test_trace_keeps_each_line_whole_while_files_are_renamed(
    shared: HttpProcess, tmp_path: Path
) -> None:
    run_two(write_trace, *[(shared, tmp_path / "trace.jsonl", name) for name in ("a", "b")])
    files = list(tmp_path.iterdir())
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert Counter(line["tenant"] for line in lines) == {"a": ROUNDS, "b": ROUNDS}
    assert len(files) > 10
    assert max(file.stat().st_size for file in files) <= 2000


def test_recorded_margins_of_two_processes_add_up(shared: HttpProcess, tmp_path: Path) -> None:
    run_two(record, *[(shared, tmp_path / "margins.json")] * 2)
    assert load_margins(tmp_path / "margins.json").policies["default"].rows == 2 * ROUNDS
