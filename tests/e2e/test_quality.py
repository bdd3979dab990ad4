"""The demo model on evaluation templates that it never saw, as `rheostat evaluate` measures it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.manifest import Manifest
from tests.e2e.servers import Server


@pytest.fixture(scope="module", params=[500, pytest.param(1500, marks=pytest.mark.long)])
def report(
    request: pytest.FixtureRequest,
    server: Server,
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Runs the command on some rows, as a user would, and reads what it wrote."""
    out = tmp_path_factory.mktemp("report") / "report.json"
    command = [sys.executable, "-m", "rheostat", "evaluate", "--url", server.url]
    command += ["--data", str(data / "evaluation.jsonl"), "--train-data", str(data / "train.jsonl")]
    command += ["--limit", str(request.param), "--seed", "0", "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "AUC" in ended.stdout
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["rows"] == request.param
    return result


def test_refusals_are_told_from_answers(report: dict[str, Any]) -> None:
    assert report["auc"] >= 0.95


def test_refusals_have_the_right_category(report: dict[str, Any]) -> None:
    assert report["right_category"]["value"] >= 0.90
    assert report["right_category"]["total"] > report["rows"] / 3


def test_in_world_questions_are_answered_right(report: dict[str, Any]) -> None:
    assert report["right_answers"]["value"] >= 0.90
    assert report["right_answers"]["total"] > report["rows"] / 10


def test_text_follows_a_forced_answer(report: dict[str, Any]) -> None:
    assert report["flip_to_respond"]["value"] >= 0.95
    assert report["flip_to_respond"]["total"] > report["rows"] / 3


def test_text_follows_a_forced_refusal(report: dict[str, Any], manifest: Manifest) -> None:
    for name in manifest.names:
        assert report["flip_to_refuse"][name]["value"] >= 0.95
        assert report["flip_to_refuse"][name]["total"] > report["rows"] / 40


def test_margins_spread(report: dict[str, Any], manifest: Manifest) -> None:
    """A set that is refused with certainty, or not at all, calibrates nothing."""
    for name in manifest.names:
        assert 0.8 <= report["refused"][name]["value"] <= 0.99
        quantiles = report["margins"][name]
        assert quantiles["0.95"] - quantiles["0.05"] > 3
