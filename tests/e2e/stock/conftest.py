"""A server of ours and one of stock vLLM, for the tests that compare them."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from openai import OpenAI

from tests.e2e.servers import Server, rheostat_server, stock_server


class Pair(NamedTuple):
    """Both, with the same checkpoint; they may still be starting."""

    ours: Server
    stock: Server


@pytest.fixture(scope="package")
def pair(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Starts both at once: a start keeps one core busy."""
    folder = tmp_path_factory.mktemp("pair")
    with ExitStack() as ends:
        ours = rheostat_server(checkpoint, folder / "rheostat.log")
        ends.callback(ours.end)
        stock = stock_server(checkpoint, folder / "stock.log")
        ends.callback(stock.end)
        yield Pair(ours, stock)


@pytest.fixture(scope="package")
def server(pair: Pair) -> Server:
    """Rheostat without a policy file."""
    return pair.ours.wait_until_ready()


@pytest.fixture(scope="package")
def stock(pair: Pair) -> Server:
    """VLLM as it is."""
    return pair.stock.wait_until_ready()


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai() as openai:
        yield openai
