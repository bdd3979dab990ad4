import json
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from training.calibration.prompts import Prompts, identified, read_prompts, repeated
from training.config.data import Source, named_sources

NAMES = ("safety", "humanizing")


def _csv(path: Path) -> Path:
    lines = ["question,label"]
    lines += [f"How do I steal {n}?,harmful" for n in range(20)]
    lines += [f'"Do you, really, love {n}?",personal' for n in range(20)]
    lines += [f"Where is {n}?," for n in range(5)]
    lines += [f"What is {n}?,fine" for n in range(5)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _csv_source(path: Path, **fields: Any) -> Prompts:
    return Prompts((Source(path=str(_csv(path)), **fields),))


def test_csv_is_read_through_columns_and_labels(tmp_path: Path) -> None:
    _csv(tmp_path / "ours.csv")
    sources = tmp_path / "sources.yaml"
    sources.write_text(
        f"""
        - path: {tmp_path / "ours.csv"}
          columns: {{prompt: question, category: label}}
          categories: {{harmful: safety, personal: humanizing, fine: null, "": null}}
        """
    )

    rows = read_prompts(Prompts(named_sources(sources)), NAMES)

    assert [row.category for row in rows] == ["safety"] * 20 + ["humanizing"] * 20 + [None] * 10
    assert rows[20].prompt[0].content == "Do you, really, love 0?"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"no column 'prompt'.*with columns: \{prompt: NAME\}"),
        (
            {"columns": {"prompt": "question", "category": "label"}},
            r"'harmful' is unknown; known are safety, humanizing",
        ),
        ({"categories": {"a": "rude"}}, r"\{a: rude\}: 'rude' is none of .*safety, humanizing"),
    ],
)
def test_wrong_mapping_says_what_to_write(
    tmp_path: Path, fields: dict[str, dict[str, str]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_prompts(_csv_source(tmp_path / "ours.csv", **fields), NAMES)


def test_limit_weight_and_bad_rows_of_a_source_count(tmp_path: Path) -> None:
    path = _rows(tmp_path / "ours.jsonl", ("Why?", None))
    path.write_text(path.read_text() + "{}\n")
    source = Source(path=str(path), weight=2, bad_rows="drop")
    told: list[str] = []

    assert len(read_prompts(Prompts((source,)), NAMES, told.append)) == 82
    (line,) = told
    assert line.startswith(f"{path}: 1 rows are left out: {path}:42: prompt: is missing")


def test_several_files_are_one_set_of_prompts(tmp_path: Path) -> None:
    paths = []
    for name, kind in (("a", "safety"), ("b", "humanizing")):
        rows = [{"prompt": f"{name} {n}", "category": kind, "response": "No."} for n in range(20)]
        path = tmp_path / name / "prompts.jsonl"
        path.parent.mkdir()
        path.write_text("\n".join(map(json.dumps, rows)))
        paths.append(path)
    files = Prompts(tuple(Source(path=str(path)) for path in paths))

    assert len(read_prompts(files, NAMES)) == 40
    assert list(identified(files)) == ["prompts.jsonl", str(paths[1])]


def _rows(path: Path, *more: tuple[str, str | None]) -> Path:
    rows = [(f"{name} {n}?", name) for name in NAMES for n in range(20)]
    lines = [json.dumps({"prompt": text, "category": name}) for text, name in (*rows, *more)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_prompt_of_two_categories_names_both_places(tmp_path: Path) -> None:
    path = _rows(tmp_path / "ours.jsonl", ("safety 3?", None))
    with pytest.raises(
        ConfigError,
        match=r"ours.jsonl:41: the prompt is to be answered here and of the category 'safety' at "
        r".*ours.jsonl:4; a prompt has one category",
    ):
        read_prompts(Prompts(named_sources(path)), NAMES)


def test_repeated_prompts_count_as_often_as_they_occur(tmp_path: Path) -> None:
    path = _rows(tmp_path / "ours.jsonl", ("safety 3?", "safety"), ("safety 3?", "safety"))
    rows = read_prompts(Prompts(named_sources(path)), NAMES)
    assert len(rows) == 42
    assert repeated(rows) == 2


def test_too_few_prompts_after_a_limit_say_so(tmp_path: Path) -> None:
    files = Prompts(named_sources(_rows(tmp_path / "ours.jsonl")), limit=25)
    with pytest.raises(ConfigError, match=r"ours.jsonl \(with --limit 25\): \d+ prompts of"):
        read_prompts(files, NAMES)
