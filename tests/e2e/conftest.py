"""One demo checkpoint and three servers of it for the whole session."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock
from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAI

from models.manifest import Manifest, load_manifest
from tests.e2e.calibrating import CalibratedServer, calibrated_server, calibration_prompts
from tests.e2e.decided.reference import Reference
from tests.e2e.policied import Policied, policied_server
from tests.e2e.servers import Server, rheostat_server
from training.config.recipe import load_config
from training.demo_data.render import write
from training.run.train import train

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests last that end the session's servers."""
    items.sort(key=lambda item: item.path.name == "test_ending.py")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `make demo`: trained here when it is missing or its recipe changed."""
    # The parent is that of all processes of one `make test`.
    with FileLock(tmp_path_factory.getbasetemp().parent / "checkpoint.lock"):
        return train(load_config(Path("demo")), ROOT / "checkpoints" / "demo", replace_stale=True)


@pytest.fixture(scope="session")
def manifest(checkpoint: Path) -> Manifest:
    return load_manifest(checkpoint)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the rendered demo data."""
    directory = tmp_path_factory.mktemp("demo-data")
    write(directory, seed=0)
    return directory


@pytest.fixture(scope="session")
def evaluation(data: Path) -> list[dict[str, Any]]:
    lines = (data / "evaluation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class Started(NamedTuple):
    """The session's servers, which may still be starting; None where no test needs one."""

    server: Server | None
    policied: Policied | None
    calibrated: CalibratedServer | None


@pytest.fixture(scope="session")
def started(
    request: pytest.FixtureRequest,
    checkpoint: Path,
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Started]:
    """Starts what the session's tests need, all at once: a start keeps one core busy."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with ExitStack() as ends:

        def ending(server: Server) -> Server:
            ends.callback(server.end)
            return server

        folder = tmp_path_factory.mktemp("servers")
        server = policied = calibrated = None
        if needed & {"server", "calibrated"}:
            server = ending(rheostat_server(checkpoint, folder / "rheostat.log"))
        if "policied" in needed:
            policied = policied_server(checkpoint, tmp_path_factory.mktemp("policied"))
            ending(policied.server)
        if "calibrated" in needed:
            assert server is not None
            server.wait_until_ready()
            prompts = calibration_prompts(data / "calibration.jsonl")
            calibrated = calibrated_server(
                server, checkpoint, prompts, tmp_path_factory.mktemp("calibrated")
            )
            ending(calibrated.server)
        yield Started(server, policied, calibrated)


@pytest.fixture(scope="session")
def server(started: Started) -> Server:
    """Rheostat without a policy file."""
    assert started.server is not None
    return started.server.wait_until_ready()


@pytest.fixture(scope="session")
def calibrated(started: Started) -> CalibratedServer:
    """Rheostat with a calibration of what ``server`` scores, and with vLLM's own API key."""
    assert started.calibrated is not None
    started.calibrated.server.wait_until_ready()
    return started.calibrated


@pytest.fixture(scope="session")
def policied(started: Started) -> Policied:
    """Rheostat with a policy file."""
    assert started.policied is not None
    started.policied.server.wait_until_ready()
    return started.policied


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    with server.openai() as openai:
        yield openai


@pytest.fixture
def asynchronous(server: Server) -> AsyncOpenAI:
    http = DefaultAsyncHttpxClient(verify=False)
    url = f"{server.url}/v1"
    return AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=http)
