"""Inspect's XSTest and CoCoNot, with local copies of their shape: the scorer reads the refusal."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.servers import Server
from tests.e2e.tools.blocks import PAGE_URL, block, python_of, run
from tests.training.judgeserver import Body, Said, judge_server

pytestmark = pytest.mark.tools

JUDGE_URL = "http://127.0.0.1:9000/v1"
GENERAL = "You are a helpful assistant."
SAFETY = "Requests with safety concerns"


class Asked(NamedTuple):
    """What the server makes of a prompt."""

    prompt: str
    text: str
    refused: bool


def ask(server: Server, prompt: str, system: str | None) -> Asked:
    turns = [{"role": "system", "content": system}] if system else []
    body = {
        "model": "demo",
        "messages": [*turns, {"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 256,
    }
    message = server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    refusal = message.get("refusal")
    return Asked(prompt, refusal or message["content"], refusal is not None)


def write_copy(folder: Path, subset: str, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "test.parquet")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n"
        "  - split: test\n    path: test.parquet\n---\n"
    )


def grader(asked: Sequence[Asked]) -> Any:
    """Returns what grades as the server decided, if the refusal's text is in front of it."""
    refusals = [one.text for one in asked if one.refused]

    def says(body: Body, number: int) -> Said:
        refused = any(text in body["messages"][-1]["content"] for text in refusals)
        grades = ("I", "ACCEPTABLE") if refused else ("C", "UNACCEPTABLE")
        return Said(f"<label>{grades[1]}</label>\nGRADE: {grades[0]}")

    return says


def evaluate(task: str, server: Server, folder: Path, asked: Sequence[Asked]) -> Any:
    """Runs the page's line for a task and returns its log."""
    lines = block("Inspect", "sh", server.url).replace("\\\n", " ").splitlines()
    (line,) = [line for line in lines if f"inspect_evals/{task}" in line]
    tool, *words = shlex.split(line)
    with judge_server(grader(asked)) as judge:
        run(
            python_of("inspect").with_name(tool),
            *words,
            *("--log-dir", "logs", "--log-format", "json", "--display", "none"),
            folder=folder,
            RHEOSTAT_BASE_URL=f"{server.url}/v1",
            RHEOSTAT_API_KEY="none",
            JUDGE_BASE_URL=judge.url,
            JUDGE_API_KEY="none",
        )
        assert len(judge.bodies) == len(asked)
    (log,) = (folder / "logs").glob("*.json")
    return json.loads(log.read_text())


@pytest.fixture(scope="module")
def harmful(evaluation: list[dict[str, Any]]) -> list[str]:
    """A few prompts of the demo's, most of which it refuses."""
    return [row["prompt"] for row in evaluation if row["category"] == "safety"][:4]


def test_page_names_the_addresses_that_this_test_replaces() -> None:
    lines = block("Inspect", "sh", PAGE_URL)
    assert f"RHEOSTAT_BASE_URL={PAGE_URL}/v1" in lines
    assert f"JUDGE_BASE_URL={JUDGE_URL}" in lines


def test_xstest_counts_the_refusals(server: Server, tmp_path: Path, harmful: list[str]) -> None:
    asked = [ask(server, prompt, GENERAL) for prompt in harmful]
    fields = {"focus": "", "type": "contrast_x", "note": "", "label": "unsafe"}
    rows = [{"prompt": prompt, **fields} for prompt in harmful]
    write_copy(tmp_path / "walledai" / "XSTest", "default", rows)

    log = evaluate("xstest", server, tmp_path, asked)

    assert log["status"] == "success"
    refused = sum(one.refused for one in asked)
    assert refused > 0
    metrics = log["results"]["scores"][0]["metrics"]
    assert metrics["refusal_rate"]["value"] == pytest.approx(100 * refused / len(asked))
    check_marks(log, asked)


def test_coconots_scorer_accepts_the_refusals(
    server: Server, tmp_path: Path, harmful: list[str]
) -> None:
    asked = [ask(server, prompt, None) for prompt in harmful]
    fields = {"category": SAFETY, "subcategory": "dangerous or sensitive topics", "response": ""}
    rows = [{"id": str(n), "prompt": prompt, **fields} for n, prompt in enumerate(harmful)]
    write_copy(tmp_path / "allenai" / "coconot", "original", rows)

    log = evaluate("coconot", server, tmp_path, asked)

    assert log["status"] == "success"
    complied = sum(not one.refused for one in asked)
    assert complied < len(asked)
    metrics = log["results"]["scores"][0]["metrics"]
    assert metrics[SAFETY]["value"] == pytest.approx(100 * complied / len(asked))
    check_marks(log, asked)


def check_marks(log: Any, asked: Sequence[Asked]) -> None:
    """Inspect marks the text of a refusal as one, and no other."""
    by_prompt = {one.prompt: one for one in asked}
    for sample in log["samples"]:
        content = sample["output"]["choices"][0]["message"]["content"]
        one = by_prompt[sample["input"]]
        if one.refused:
            assert content == [{"type": "text", "text": one.text, "refusal": True}]
        else:
            assert content == one.text
