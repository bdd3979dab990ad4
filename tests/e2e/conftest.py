"""One demo checkpoint, one Rheostat server and one stock server for the whole session."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from models.calibration import CALIBRATIONS
from models.manifest import Manifest, load_manifest
from tests.e2e.calibrating import KEY, CalibratedServer, calibrate, calibration_prompts
from tests.e2e.decided.reference import Reference
from tests.e2e.policied import Policied, policied_server
from tests.e2e.servers import Server, rheostat_server, stock_server
from training.config.recipe import load_config
from training.demo_data.render import write
from training.run.train import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The checkpoint of `make demo`: trained here when it is missing or its recipe changed."""
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


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "rheostat.log"
    with rheostat_server(checkpoint, log) as running:
        yield running


@pytest.fixture(scope="session")
def stock(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("stock") / "stock.log"
    with stock_server(checkpoint, log) as running:
        yield running


@pytest.fixture(scope="session")
def calibrated(
    server: Server, checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CalibratedServer]:
    """A server of the same checkpoint, calibrated with what the other one scores."""
    folder = tmp_path_factory.mktemp("calibrated")
    copied = folder / "demo"
    shutil.copytree(checkpoint, copied, ignore=shutil.ignore_patterns(CALIBRATIONS))
    prompts = calibration_prompts(data / "calibration.jsonl")
    calibration = calibrate(server.url, copied, prompts)
    margins = folder / "margins.json"
    recording = {"RHEOSTAT_RECORD_SHARE": "0.5", "RHEOSTAT_RECORD_FILE": str(margins)}
    flags = ("--api-key", KEY)
    with rheostat_server(copied, folder / "log", *flags, variables=recording) as running:
        yield CalibratedServer(running, calibration, prompts, margins)


@pytest.fixture(scope="session")
def policied(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policied]:
    with policied_server(checkpoint, tmp_path_factory.mktemp("policies")) as running:
        yield running


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai:
        yield openai


@pytest.fixture
def asynchronous(server: Server) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
