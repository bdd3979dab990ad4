import json
from pathlib import Path

import pytest

from models.errors import ConfigError
from training.calibration.prompts import (
    PromptFiles,
    checked_format,
    columns,
    identified,
    labels,
    read_prompts,
    repeated,
)

NAMES = ("safety", "humanizing")


def _csv(path: Path) -> Path:
    lines = ["question,label"]
    lines += [f"How do I steal {n}?,harmful" for n in range(20)]
    lines += [f'"Do you, really, love {n}?",personal' for n in range(20)]
    lines += [f"Where is {n}?," for n in range(5)]
    lines += [f"What is {n}?,fine" for n in range(5)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_csv_is_read_through_columns_and_labels(tmp_path: Path) -> None:
    files = PromptFiles(
        (_csv(tmp_path / "ours.csv"),),
        columns=columns(["prompt=question", "category=label"]),
        categories=labels(["harmful=safety", "personal=humanizing", "fine=null", "="]),
    )

    rows = read_prompts(files, NAMES)

    assert [row.category for row in rows] == ["safety"] * 20 + ["humanizing"] * 20 + [None] * 10
    assert rows[20].prompt[0].content == "Do you, really, love 0?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"no column 'prompt'.*here: --column prompt=NAME"),
        ({"columns": {"prompt": "question"}}, r"no column 'category'.*--column prompt=NAME"),
        (
            {"columns": {"prompt": "question", "category": "label"}},
            r"'harmful' is unknown; known are safety, humanizing(.|\n)*--map LABEL=CATEGORY",
        ),
        ({"columns": {"question": "prompt"}}, r"--column: columns.question.*: Input should be"),
        ({"categories": {"a": "rude"}}, r"--map a=rude: 'rude' is none of .*safety, humanizing"),
    ],
)
def test_wrong_mapping_says_what_to_write_on_the_command_line(
    tmp_path: Path, options: dict[str, dict[str, str]], message: str
) -> None:
    files = PromptFiles((_csv(tmp_path / "ours.csv"),), **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        read_prompts(files, NAMES)


def test_several_files_are_one_set_of_prompts(tmp_path: Path) -> None:
    paths = []
    for name, kind in (("a", "safety"), ("b", "humanizing")):
        rows = [{"prompt": f"{name} {n}", "category": kind, "response": "No."} for n in range(20)]
        path = tmp_path / name / "prompts.jsonl"
        path.parent.mkdir()
        path.write_text("\n".join(map(json.dumps, rows)))
        paths.append(path)
    files = PromptFiles(tuple(paths))

    assert len(read_prompts(files, NAMES)) == 40
    assert list(identified(files)) == ["prompts.jsonl", str(paths[1])]


def test_missing_file_and_no_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.jsonl: cannot be read"):
        read_prompts(PromptFiles((tmp_path / "absent.jsonl",)), NAMES)
    with pytest.raises(ConfigError, match="no data: --data FILE"):
        read_prompts(PromptFiles(()), NAMES)


def test_labels_split_at_the_last_sign_and_columns_at_the_first() -> None:
    assert labels(["a=b=safety", "x=null", "y="]) == {"a=b": "safety", "x": None, "y": None}
    assert columns(["prompt=a=b"]) == {"prompt": "a=b"}


@pytest.mark.parametrize("texts", [["safety"], ["a=b", "a=c"]])
def test_mapping_of_another_form_is_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="--map"):
        labels(texts)
    with pytest.raises(ConfigError, match="--column"):
        columns(texts)


def test_format_is_one_of_three() -> None:
    assert checked_format("coconot") == "coconot"
    with pytest.raises(ConfigError, match="--format 'csv': must be one of rows, chat, coconot"):
        checked_format("csv")


def _rows(path: Path, *more: tuple[str, str | None]) -> Path:
    rows = [(f"{name} {n}?", name) for name in NAMES for n in range(20)]
    lines = [json.dumps({"prompt": text, "category": name}) for text, name in (*rows, *more)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_prompt_of_two_categories_names_both_places(tmp_path: Path) -> None:
    path = _rows(tmp_path / "ours.jsonl", ("safety 3?", None))
    with pytest.raises(
        ConfigError,
        match=r"ours.jsonl:41: the prompt stands at .*ours.jsonl:4 too, where it is of the "
        r"category 'safety', and here to be answered",
    ):
        read_prompts(PromptFiles((path,)), NAMES)


def test_repeated_prompts_count_as_often_as_they_occur(tmp_path: Path) -> None:
    path = _rows(tmp_path / "ours.jsonl", ("safety 3?", "safety"), ("safety 3?", "safety"))
    rows = read_prompts(PromptFiles((path,)), NAMES)
    assert len(rows) == 42
    assert repeated(rows) == 2


def test_too_few_prompts_after_a_limit_say_so(tmp_path: Path) -> None:
    files = PromptFiles((_rows(tmp_path / "ours.jsonl"),), limit=25)
    with pytest.raises(ConfigError, match=r"ours.jsonl \(with --limit 25\): \d+ prompts of"):
        read_prompts(files, NAMES)
