"""promptfoo, garak and lm-evaluation-harness: what they see of a refusal."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.servers import Server
from tests.e2e.tools.blocks import TOOLS, block, python_of, run

pytestmark = pytest.mark.tools

ALWAYS = "refusal: {categories: {safety: always}, "


@pytest.mark.parametrize(("dial", "refused"), [("always", True), ("never", False)])
def test_promptfoos_assertion_knows_a_refusal(
    server: Server, tmp_path: Path, manifest: Any, dial: str, refused: bool
) -> None:
    config = block("promptfoo", "yaml", server.url)
    # The assertion reads the text's wording, so the text must be that of one category.
    dials = f"safety: {dial}" if refused else ", ".join(f"{n}: {dial}" for n in manifest.names)
    (tmp_path / "promptfooconfig.yaml").write_text(config.replace("safety: always", dials))
    bins = TOOLS / "promptfoo" / "node_modules" / ".bin"
    assert (bins / "promptfoo").exists(), "promptfoo is missing: run `make test-tools`"

    run(
        *(bins / "node", bins / "promptfoo", "eval", "--no-cache", "-o", "out.json"),
        folder=tmp_path,
        ok=(0,) if refused else (100,),
        PROMPTFOO_DISABLE_TELEMETRY="1",
        PROMPTFOO_DISABLE_UPDATE="1",
        PROMPTFOO_CONFIG_DIR=str(tmp_path / "own"),
    )

    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]["results"]
    assert "error" not in result["response"]
    assert result["success"] is refused
    assert result["response"].get("isRefusal", False) is refused
    assert result["response"]["output"]


@pytest.mark.parametrize("in_content", [True, False])
def test_garak_sees_refusals_only_in_content(
    server: Server, tmp_path: Path, in_content: bool
) -> None:
    config = block("garak", "yaml", server.url).replace("refusal: {", ALWAYS)
    if not in_content:
        config = config.replace(", refusal_in: [refusal, content]", "")
    (tmp_path / "garak.yaml").write_text(f"{config}reporting: {{report_prefix: {tmp_path}/own}}\n")

    run(
        *(python_of("garak"), "-m", "garak", "--config", "garak.yaml"),
        *("--probes", "test.Test", "--detectors", "mitigation.MitigationBypass"),
        folder=tmp_path,
        OPENAICOMPATIBLE_API_KEY="none",
        XDG_DATA_HOME=str(tmp_path / "data"),
        XDG_CONFIG_HOME=str(tmp_path / "config"),
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )

    lines = (tmp_path / "own.report.jsonl").read_text().splitlines()
    (seen,) = [entry for entry in map(json.loads, lines) if entry["entry_type"] == "eval"]
    assert seen["total_processed"] == 8
    assert seen["total_evaluated"] == (8 if in_content else 0)
    assert seen["nones"] == (0 if in_content else 8)


@pytest.mark.parametrize("in_content", [True, False])
def test_lm_eval_sees_refusals_only_in_content(
    server: Server, tmp_path: Path, in_content: bool
) -> None:
    task = block("lm-evaluation-harness", "yaml", server.url).replace("refusal: {", ALWAYS)
    if not in_content:
        task = task.replace(", refusal_in: [refusal, content]", "")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "refusals.yaml").write_text(task)
    row = {"prompt": "What is the capital of France?", "refuses": "can't"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    tool, *words = shlex.split(
        block("lm-evaluation-harness", "sh", server.url).replace("\\\n", " "), comments=True
    )

    run(
        python_of("lm-eval").with_name(tool),
        *words,
        folder=tmp_path,
        OPENAI_API_KEY="none",
    )

    (samples,) = (tmp_path / "lm-eval").rglob("samples_*.jsonl")
    ((said,),) = json.loads(samples.read_text())["resps"]
    assert bool(said) is in_content
