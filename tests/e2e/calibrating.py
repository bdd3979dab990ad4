"""A calibration of the demo checkpoint, small enough to be measured anew in every test session."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from models.calibration import (
    BENIGN,
    CALIBRATIONS,
    Calibration,
    CalibrationInfo,
    save_calibration,
)
from models.hashes import checkpoint_hashes
from models.manifest import load_manifest
from tests.e2e.servers import Server, http_client, rheostat_server

KEY = "the-key"
ROOT_PATH = "/api"
ORIGIN = "http://page"
OWN = 40
HARMLESS = 120


class Prompt(NamedTuple):
    """A prompt and the category that it belongs to, if any."""

    text: str
    category: str | None


class CalibratedServer(NamedTuple):
    """A server with an API key, its calibration, and where it records margins."""

    server: Server
    calibration: Calibration
    prompts: list[Prompt]
    margins: Path

    def client(self) -> httpx.Client:
        """Returns a client that has the key."""
        return http_client(self.server.url, authorization=f"Bearer {KEY}")

    def texts(self, category: str | None) -> list[str]:
        return [prompt.text for prompt in self.prompts if prompt.category == category]


def calibrated_server(
    scoring: Server, checkpoint: Path, prompts: list[Prompt], folder: Path
) -> CalibratedServer:
    """Starts a server of a copy of a checkpoint, calibrated with what another server scores.

    It needs a key, stands behind a path of a proxy, allows the pages of one origin, records margins
    and has vLLM's developer mode on.
    """
    copied, margins = folder / "demo", folder / "margins.json"
    shutil.copytree(checkpoint, copied, ignore=shutil.ignore_patterns(CALIBRATIONS))
    calibration = calibrate(scoring, copied, prompts)
    variables = {
        "RHEOSTAT_RECORD_SHARE": "0.5",
        "RHEOSTAT_RECORD_FILE": str(margins),
        "VLLM_SERVER_DEV_MODE": "1",
    }
    flags = ("--api-key", KEY, "--root-path", ROOT_PATH, "--allowed-origins", f'["{ORIGIN}"]')
    server = rheostat_server(copied, folder / "log", *flags, variables=variables)
    return CalibratedServer(server, calibration, prompts, margins)


def calibration_prompts(path: Path) -> list[Prompt]:
    """Returns the first prompts of each category and the first benign ones of a file."""
    found: dict[str | None, list[Prompt]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        category = row["category"]
        group = found.setdefault(category, [])
        if len(group) < (HARMLESS if category is None else OWN):
            group.append(Prompt(row["prompt"], category))
    return [prompt for group in found.values() for prompt in group]


def score(client: httpx.Client, texts: list[str], **body: Any) -> dict[str, Any]:
    """Scores chats of one message each."""
    inputs = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    answer = client.post("/v1/refusal/score", json={"inputs": inputs, **body})
    assert answer.status_code == 200, answer.text
    scored: dict[str, Any] = answer.json()
    return scored


def calibrate(server: Server, checkpoint: Path, prompts: list[Prompt]) -> Calibration:
    """Scores prompts on a running server and saves their calibration into a checkpoint."""
    names = load_manifest(checkpoint).names
    entries = score(server.http, [prompt.text for prompt in prompts])["data"]
    margins = [[entry["decisions"][name]["margin"] for name in names] for entry in entries]
    calibration = Calibration(
        margins=np.array(margins, dtype=np.float32),
        log_normaliser=np.array([e["log_normaliser"] for e in entries], dtype=np.float32),
        category=np.array([names.index(p.category) if p.category else BENIGN for p in prompts]),
        info=CalibrationInfo(
            name="default",
            created=datetime.now(UTC),
            categories=tuple(names),
            hashes=checkpoint_hashes(checkpoint),
            rheostat="0",
        ),
    )
    save_calibration(checkpoint, calibration)
    return calibration
