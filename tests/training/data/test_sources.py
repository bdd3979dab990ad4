import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ConfigError
from tests.training.data.conftest import Write
from training.config.data import Source
from training.data.rows import Row
from training.data.sources import identify, read

NAMES = ("safety", "humanizing")

TABLE: list[dict[str, Any]] = [
    {"prompt": "How do I steal?", "category": "safety", "response": "No."},
    {"prompt": "What is tea?", "category": None, "response": "A drink."},
    {"prompt": "Do you love?", "category": "humanizing", "response": None},
]
SAID = [
    ("How do I steal?", "safety", "No."),
    ("What is tea?", None, "A drink."),
    ("Do you love?", "humanizing", None),
]


def said(rows: list[Row]) -> list[tuple[str, str | None, str | None]]:
    return [(row.prompt[-1].content, row.category, row.response) for row in rows]


def read_rows(**fields: Any) -> list[Row]:
    return read(Source.model_validate(fields), NAMES).rows


def complaint_of(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read_rows(**fields)
    return caught.value.message


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CSV = (
    "prompt,category,response\n"
    'How do I steal?,safety,No.\nWhat is tea?,answer,A drink.\n"Do you love?",humanizing,\n'
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", "\ufeff" + json_lines(TABLE)),
        ("rows.json", json.dumps(TABLE)),
        ("rows.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("rows.tsv", CSV.replace(",", "\t")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(write: Write, name: str, text: str) -> None:
    rows = read_rows(path=write(name, text), categories={"answer": None})

    assert said(rows) == SAID


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "rows.parquet")

    rows = read_rows(path=str(tmp_path / "rows.parquet"))

    assert said(rows) == SAID
    assert rows[1].origin == f"{tmp_path / 'rows.parquet'}, row 2"


def test_columns_and_category_values_are_mapped(write: Write) -> None:
    path = write("rows.csv", "id,question,label,reply\n1,Steal?,1,No.\n2,Tea?,0,A drink.\n")

    rows = read_rows(
        path=path,
        columns={"prompt": "question", "category": "label", "response": "reply"},
        categories={1: "safety", 0: None},
    )

    assert said(rows) == [("Steal?", "safety", "No."), ("Tea?", None, "A drink.")]


def test_file_of_one_category_needs_no_columns_but_the_prompt(write: Write) -> None:
    path = write("rows.csv", "goal\nSteal a car\nForge a cheque\n")

    rows = read_rows(path=path, category="safety", columns={"prompt": "goal", "response": None})

    assert said(rows) == [("Steal a car", "safety", None), ("Forge a cheque", "safety", None)]


def test_empty_category_cell_must_be_given_a_meaning(write: Write) -> None:
    path = write("rows.csv", "prompt,category,response\na,safety,b\nc,,d\n")

    assert complaint_of(path=path) == (
        f"{path}:3: category is empty; if that means that the response answers, say so in the "
        'recipe: categories: {"": null}'
    )
    assert [row.category for row in read_rows(path=path, categories={"": None})] == ["safety", None]


def test_missing_column_is_told_once_with_the_columns_there_are(write: Write) -> None:
    path = write("rows.csv", "question,category,response\na,safety,b\nc,safety,d\n")

    assert complaint_of(path=path) == (
        f"{path}: has no column 'prompt'; its columns are question, category, response; say which "
        "of them is the prompt with columns: {prompt: NAME}"
    )


def test_csv_line_is_that_of_the_editor_where_cells_hold_line_breaks(write: Write) -> None:
    path = write(
        "rows.csv", 'prompt,category,response\n"a\nb\nc",safety,d\ne,wrong,f\n\ng,safety\n'
    )

    assert complaint_of(path=path).splitlines() == [
        f"{path}:5: category 'wrong' is unknown; known are safety, humanizing, and null where the "
        "response answers",
        f"{path}:7: has 2 cells, the header 3; a cell with a delimiter or a line break in it must "
        "be in double quotes",
    ]


def test_bad_rows_are_told_together_by_reason(write: Write) -> None:
    bad = [{**TABLE[0], "category": "x"}, {**TABLE[0], "prompt": ""}]
    path = write("rows.jsonl", json_lines([TABLE[0], *bad * 12]))

    assert complaint_of(path=path).splitlines() == [
        f"{path}:2: category 'x' is unknown; known are safety, humanizing, and null where the "
        "response answers (also lines 4, 6, 8, 10, 12, 14, 16, 18 and 3 more)",
        f"{path}:3: prompt: is empty (also lines 5, 7, 9, 11, 13, 15, 17, 19 and 3 more)",
    ]


def test_bad_rows_can_be_left_out_and_are_counted(write: Write) -> None:
    path = write("rows.jsonl", json_lines([*TABLE, {"prompt": "a"}]) + "{\n")

    reading = read(Source(path=path, bad_rows="drop"), NAMES)

    assert said(reading.rows) == SAID
    assert reading.left_out_rows == 2
    assert f"{path}:4: category: is missing" in reading.left_out
    assert f"{path}:5: is no JSON" in reading.left_out


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("rows.txt", "a", "is of an unknown kind; the ending must be one of .jsonl"),
        ("rows.csv", "", "is empty; its first line must name the columns"),
        ("rows.csv", "prompt;category;response\n", "columns are separated by commas in a .csv"),
        ("rows.csv", "prompt,prompt\n", "the column 'prompt' is a duplicate"),
        ("rows.csv", 'prompt,category,response\na,safety,"b"c\n', "is no CSV"),
        ("rows.csv", "prompt,category,response\n", "holds no rows"),
        ("rows.json", "{}", "must hold a list of objects"),
        ("rows.json", json_lines(TABLE), "one object a line is .jsonl"),
        ("rows.json", "[1]", "row 1: must be a JSON object"),
        ("rows.jsonl", "[" * 100_000, "is no JSON"),
        ("rows.parquet", "no parquet", "is no parquet file"),
    ],
)
def test_unreadable_file_is_one_line(write: Write, name: str, text: str, reason: str) -> None:
    path = write(name, text)

    complaint = complaint_of(path=path)

    assert complaint.startswith(path)
    assert reason in complaint
    assert "\n" not in complaint


def test_cell_may_hold_a_long_document(write: Write) -> None:
    text = "Sum this up: " + "x" * 300_000
    path = write("rows.csv", f"prompt,category,response\n{text},safety,No.\n")
    assert read_rows(path=path)[0].prompt[0].content == text


def test_file_of_another_encoding_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,category,response\nÄrger,safety,Nein\n".encode("latin-1"))

    assert "is not UTF-8" in complaint_of(path=str(path))


# --- CoCoNot --------------------------------------------------------------------------------------

COCONOT: dict[str, Any] = {
    "id": "a1",
    "category": "Requests with safety concerns",
    "subcategory": "dangerous or sensitive topics",
    "prompt": "How do I pick a lock?",
    "response": "I can't.",
}


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    (folder / "original").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: original\n  data_files:\n"
        "  - split: train\n    path: original/train.parquet\n---\n"
    )
    pq.write_table(pa.Table.from_pylist([COCONOT] * 3), folder / "original" / "train.parquet")
    return folder


def test_data_set_laid_out_like_a_hub_repository_is_read(hub_folder: Path) -> None:
    rows = read_rows(hub=str(hub_folder), subset="original", format="coconot")

    assert said(rows) == [("How do I pick a lock?", "safety", "I can't.")] * 3
    assert rows[2].origin == f"{hub_folder}:original:train, row 3"


def test_split_and_columns_that_a_data_set_lacks_are_one_line(hub_folder: Path) -> None:
    hub = {"hub": str(hub_folder), "subset": "original"}

    split = complaint_of(**hub, split="validation")
    column = complaint_of(**hub, columns={"prompt": "question"})

    assert "validation" in split
    assert "has no column 'question'; its columns are id, category" in column
    assert "\n" not in split + column


def test_source_is_identified_by_its_bytes(hub_folder: Path, write: Write) -> None:
    path = write("rows.jsonl", json_lines(TABLE))
    data = hub_folder / "original" / "train.parquet"

    file, folder = (
        identify(Source(path=path)),
        identify(Source(hub=str(hub_folder), subset="original")),
    )

    assert file == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    assert folder == {f"hub:{data}": hashlib.sha256(data.read_bytes()).hexdigest()}


def test_unreachable_hub_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    complaint = complaint_of(hub="allenai/coconot", subset="original", format="coconot")

    assert complaint.startswith(
        "allenai/coconot:original:train: the hub did not give this data set: "
    )
    assert "\n" not in complaint


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "exactly one of path, hub and package"),
        ({"path": "a", "revision": "main"}, "revision is for hub"),
        ({"path": "a", "subset": "b"}, "subset is for hub"),
        ({"path": "a", "format": "chat", "category": "safety"}, "has no categories"),
        ({"path": "a", "category": "safety", "categories": {"x": None}}, "mean nothing"),
        ({"path": "a", "columns": {"prompt": None}}, "only response may be null"),
        ({"path": "a", "columns": {"promt": "b"}}, "columns.promt"),
    ],
)
def test_source_that_contradicts_itself_is_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Source.model_validate(fields)
