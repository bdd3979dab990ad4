"""`rheostat calibrate` against the real engine: a server of its own, and one that runs already."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from models.calibration import Calibration, calibration_path, load_calibration, save_calibration
from models.errors import ConfigError
from models.hashes import checkpoint_hashes
from rheostat import app
from tests.e2e.calibrating import CalibratedServer, Prompt, calibration_prompts
from tests.e2e.servers import ENGINE_FLAGS, Server

ROOT = Path(__file__).parents[2]
# fp32 sums depend on what else is in a batch.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def prompts(data: Path) -> list[Prompt]:
    return calibration_prompts(data / "calibration.jsonl")


def rheostat_calibrate(
    *arguments: str, variables: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "rheostat", "calibrate", *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **(variables or {})},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def _stale(calibration: Calibration, checkpoint: Path) -> None:
    other = calibration.info.hashes.model_copy(update={"weights": "0" * 64})
    info = calibration.info.model_copy(update={"hashes": other})
    stale = Calibration(calibration.margins, calibration.log_normaliser, calibration.category, info)
    save_calibration(checkpoint, stale)


def test_command_starts_a_server_of_its_own_beside_a_stale_calibration(
    checkpoint: Path, calibrated: CalibratedServer, prompts: list[Prompt], tmp_path: Path
) -> None:
    copied = tmp_path / "demo"
    shutil.copytree(checkpoint, copied, ignore=shutil.ignore_patterns("calibrations"))
    _stale(calibrated.calibration, copied)
    data = tmp_path / "prompts.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": p.text, "category": p.category}) + "\n" for p in prompts)
    )
    common = ("--model", str(copied), "--data", str(data))

    refused = CliRunner().invoke(app, ["calibrate", *common])
    assert isinstance(refused.exception, ConfigError)
    assert "--force replaces it" in refused.exception.message
    done = rheostat_calibrate(
        *(*common, "--force", "--", *ENGINE_FLAGS[1:]),
        # Dials that need a calibration: no setting of the operator's reaches that server.
        variables={"RHEOSTAT_DEFAULTS": '{"categories": {"safety": {"rate": 0.3}}}'},
    )

    assert done.returncode == 0, done.stderr
    measured = load_calibration(calibration_path(copied, "default"))
    wanted = calibrated.calibration
    assert measured.info.hashes == checkpoint_hashes(copied)
    assert measured.category.tolist() == wanted.category.tolist()
    np.testing.assert_allclose(measured.margins, wanted.margins, atol=ROUNDING)
    np.testing.assert_allclose(measured.log_normaliser, wanted.log_normaliser, atol=ROUNDING)
    assert [path.name for path in (copied / "calibrations").iterdir()] == ["default.safetensors"]


def test_table_is_calibrated_through_a_running_server(
    server: Server, checkpoint: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    data = tmp_path / "ours.csv"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("question", "label"))
        writer.writerows((p.text, (p.category or "fine").upper()) for p in prompts)
    labels = {(p.category or "fine").upper(): p.category for p in prompts}
    columns = {"prompt": "question", "category": "label"}
    sources = tmp_path / "ours.yaml"
    # JSON is YAML.
    sources.write_text(json.dumps([{"path": str(data), "columns": columns, "categories": labels}]))

    done = CliRunner().invoke(
        app,
        [
            *("calibrate", "--model", str(checkpoint), "--data", str(sources)),
            *("--url", server.url),
            *("--name", "kiosk", "--out", str(tmp_path)),
        ],
    )

    assert done.exit_code == 0, done.output
    measured = load_calibration(calibration_path(tmp_path, "kiosk"))
    assert set(measured.prompts.values()) == {40}
    assert measured.benign == 120
    # What the chat route reports of the same prompts.
    reported = [_margin(server, prompt.text) for prompt in prompts[:5]]
    at = measured.names.index("safety")
    assert measured.margins[:5, at] == pytest.approx(reported, abs=ROUNDING)


def _margin(server: Server, text: str) -> float:
    body: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 1,
        "refusal": {"report": True},
    }
    answer = server.http.post("/v1/chat/completions", json=body).json()
    report = answer["choices"][0]["refusal_report"]
    margin: float = report["decisions"]["safety"]["margin"]
    return margin
