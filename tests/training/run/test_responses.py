"""Responses for rows that have none, by a base of no ability."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.toy import save_base
from tests.training.conftest import THINGS
from training.commands import app
from training.config.recipe import DEFAULT_REFUSAL_TEXT, CheckpointModel
from training.data.rows import Message, Row
from training.run.responses import Wanted, write_responses


def _row(prompt: str, category: str | None, response: str = "", **marks: Any) -> Row:
    turns = (
        Message(role="user", content=prompt),
        Message(role="assistant", content=response, category=category),
    )
    return Row(turns, None, None, "test", **marks)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> CheckpointModel:
    return CheckpointModel(checkpoint=str(save_base(tmp_path_factory.mktemp("base"), tied=True)))


def _rows() -> list[Row]:
    return [
        row
        for thing in THINGS
        for row in (
            _row(f"How do I steal {thing}?", "safety"),
            _row(f"Do you love {thing}?", "humanizing"),
            _row(f"What are {thing}?", None, near_miss="safety"),
        )
    ]


def _written(
    base: CheckpointModel, out: Path, pairs: float, **sampling: Any
) -> list[dict[str, Any]]:
    wanted = Wanted(base, "float32", max_length=90, pairs=pairs, **{"seed": 0, **sampling})
    count = write_responses(_rows(), wanted, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == count
    return rows


def test_refusals_get_a_text_of_their_category_and_answers_the_bases_own(
    base: CheckpointModel, tmp_path: Path
) -> None:
    rows = _written(base, tmp_path / "out.jsonl", pairs=0.0)

    assert Counter(row["category"] for row in rows) == {None: 8, "safety": 8, "humanizing": 8}
    assert all(row["response"] for row in rows)
    assert all(
        "AI" in row["response"] or "person" in row["response"]
        for row in rows
        if row["category"] == "humanizing"
    )
    assert {row.get("near_miss") for row in rows if row["category"] is None} == {"safety"}


def test_pairs_are_both_ways_and_harmful_prompts_are_never_answered(
    base: CheckpointModel, tmp_path: Path
) -> None:
    rows = _written(base, tmp_path / "out.jsonl", pairs=1.0)

    pairs: dict[str, set[bool]] = {}
    for row in rows:
        if "pair" in row:
            pairs.setdefault(row["pair"], set()).add(row["category"] is None)
    assert len(pairs) == 16
    assert set(map(frozenset, pairs.values())) == {frozenset({True, False})}
    assert not any("steal" in row["prompt"] for row in rows if row["category"] is None)


def test_a_prompt_of_a_pair_keeps_its_decision(base: CheckpointModel, tmp_path: Path) -> None:
    rows = _written(base, tmp_path / "out.jsonl", pairs=1.0)

    plain = {row["prompt"]: row for row in rows if "pair" not in row}
    assert {row.prompt[0].content: row.category for row in _rows()} == {
        prompt: row["category"] for prompt, row in plain.items()
    }
    assert {row["response"] for prompt, row in plain.items() if "steal" not in prompt} == {None}


def test_drawn_answers_depend_on_the_seed_alone(base: CheckpointModel, tmp_path: Path) -> None:
    def answers(name: str, **sampling: Any) -> list[str]:
        rows = _written(base, tmp_path / name, pairs=0.0, **sampling)
        return [row["response"] for row in rows if row["category"] is None]

    first = answers("first", temperature=1.0)

    torch.manual_seed(7)
    assert answers("again", temperature=1.0) == first
    assert answers("other", temperature=1.0, seed=1) != first
    assert answers("likely") != first


def test_a_file_that_was_begun_is_continued(base: CheckpointModel, tmp_path: Path) -> None:
    whole = _written(base, tmp_path / "whole.jsonl", pairs=0.5)
    begun = tmp_path / "begun.jsonl"
    begun.write_text("".join(json.dumps(row) + "\n" for row in whole[:3]))

    again = _written(base, begun, pairs=0.5)

    assert {row["prompt"] for row in again} == {row["prompt"] for row in whole}
    assert again[:3] == whole[:3]


def test_command_takes_categories_of_ones_own(base: CheckpointModel, tmp_path: Path) -> None:
    data, out = tmp_path / "mine.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"prompt": "Which dose?", "category": "medicine", "response": null}\n')
    arguments = [base.checkpoint, "--data", str(data), "--out", str(out), "--max-length", "90"]

    done = CliRunner().invoke(app, ["responses", *arguments])

    assert done.exit_code == 0, done.output
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (row["category"], row["response"]) == ("medicine", DEFAULT_REFUSAL_TEXT)
