"""Both sides of the board, in one process and in two."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from server.generation.margins import PREFIX, ROWS, MarginBoard, Margins, Ticket
from server.margin_rows import write_rows

LOGITS = torch.tensor([[1.0, -2.0, 0.5], [3.0, 4.0, -1.0]])
NORMALISERS = torch.tensor([2.0, 5.0])


@pytest.fixture
def board(tmp_path: Path) -> MarginBoard:
    return MarginBoard(2, tmp_path)


def taken(board: MarginBoard) -> Ticket:
    return asyncio.run(board.take())


def write(tickets: list[Ticket]) -> None:
    tags = torch.tensor([float(ticket.tag) for ticket in tickets])
    count = len(tickets)
    write_rows(tickets, tags, NORMALISERS[:count], LOGITS[:count])


def test_row_holds_what_was_written_for_its_ticket(board: MarginBoard) -> None:
    first, second = taken(board), taken(board)
    assert board.read(first) is None
    write([first, second])
    assert board.read(first) == Margins(1.5, (0.5, -2.5))
    assert board.read(second) == Margins(6.0, (4.0, 5.0))


def test_late_write_for_a_request_that_went_is_not_read(board: MarginBoard) -> None:
    gone = taken(board)
    board.give_back(gone)
    for _ in range(ROWS - 1):
        taken(board)
    now = taken(board)
    assert now.row == gone.row
    assert now.tag != gone.tag
    write([gone])
    assert board.read(now) is None
    write([now])
    assert board.read(now) is not None


def test_request_without_a_free_row_waits_for_one(board: MarginBoard) -> None:
    async def wait() -> None:
        tickets = [await board.take() for _ in range(ROWS)]
        gone, waiting = (asyncio.ensure_future(board.take()) for _ in range(2))
        await asyncio.sleep(0)
        assert not waiting.done()
        gone.cancel()
        board.give_back(tickets[7])
        assert (await waiting).row == tickets[7].row

    asyncio.run(wait())


def test_memory_does_not_grow_with_the_tickets(board: MarginBoard) -> None:
    async def take(count: int) -> None:
        for _ in range(count):
            board.give_back(await board.take())

    async def more_blocks() -> int:
        await take(100)
        before = sys.getallocatedblocks()
        await take(10_000)
        return sys.getallocatedblocks() - before

    assert asyncio.run(more_blocks()) < 1000


def test_infinite_margins_come_back(board: MarginBoard) -> None:
    ticket = taken(board)
    write_rows(
        [ticket],
        torch.tensor([float(ticket.tag)]),
        torch.tensor([0.0]),
        torch.tensor([[-torch.inf, 1.0, 0.0]]),
    )
    assert board.read(ticket) == Margins(0.0, (-torch.inf, 1.0))


def test_another_process_writes_what_this_one_reads(board: MarginBoard) -> None:
    ticket = taken(board)
    script = (
        "import torch; from server.margin_rows import write_rows; "
        "from server.generation.margins import Ticket; "
        f"write_rows([Ticket(*{tuple(ticket)!r})], torch.tensor([{float(ticket.tag)}]), "
        "torch.tensor([2.0]), torch.tensor([[1.0, -2.0, 0.5]]))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert board.read(ticket) == Margins(1.5, (0.5, -2.5))


def test_file_is_gone_once_closed(board: MarginBoard, tmp_path: Path) -> None:
    assert len(list(tmp_path.iterdir())) == 1
    board.close()
    assert list(tmp_path.iterdir()) == []


def test_file_of_a_board_that_nobody_holds_is_gone_too(tmp_path: Path) -> None:
    MarginBoard(2, tmp_path)
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_file_of_a_killed_server_goes_with_the_next_start(tmp_path: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; "
        "from server.generation.margins import MarginBoard; "
        f"board = MarginBoard(2, Path({str(tmp_path)!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (abandoned,) = tmp_path.iterdir()
    assert abandoned.name.startswith(PREFIX)
    living = MarginBoard(2, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert kept != abandoned
    ticket = taken(living)
    MarginBoard(2, tmp_path).close()
    assert list(tmp_path.iterdir()) == [kept] == [Path(ticket.path)]


def test_what_is_no_file_of_a_servers_stays(tmp_path: Path) -> None:
    others = [tmp_path / "rheostat-notes", tmp_path / f"{PREFIX}folder"]
    others[0].touch()
    others[1].mkdir()
    os.mkfifo(tmp_path / f"{PREFIX}fifo")  # opening it must not wait for a writer
    MarginBoard(2, tmp_path).close()
    assert sorted(tmp_path.iterdir()) == sorted(others)
