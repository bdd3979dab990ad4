import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ConfigError
from training.config.data import Source
from training.data.rows import Row
from training.data.sources import identify, read

NAMES = ("safety", "humanizing")
Write = Callable[[str, str], str]

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


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        return str(tmp_path / name)

    return write


def _said(rows: list[Row]) -> list[tuple[str, str | None, str | None]]:
    return [(row.prompt[-1].content, row.category, row.response) for row in rows]


def _read(**fields: Any) -> list[Row]:
    return read(Source.model_validate(fields), NAMES).rows


def _complaint(**fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        _read(**fields)
    return caught.value.message


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CSV = (
    "prompt,category,response\n"
    'How do I steal?,safety,No.\nWhat is tea?,answer,A drink.\n"Do you love?",humanizing,\n'
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", "\ufeff" + _lines(TABLE)),
        ("rows.json", json.dumps(TABLE)),
        ("rows.csv", "\ufeff" + CSV.replace("\n", "\r\n")),
        ("rows.tsv", CSV.replace(",", "\t")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(write: Write, name: str, text: str) -> None:
    rows = _read(path=write(name, text), categories={"answer": None})

    assert _said(rows) == SAID


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(TABLE), tmp_path / "rows.parquet")

    rows = _read(path=str(tmp_path / "rows.parquet"))

    assert _said(rows) == SAID
    assert rows[1].origin == f"{tmp_path / 'rows.parquet'}, row 2"


def test_columns_and_category_values_are_mapped(write: Write) -> None:
    path = write("rows.csv", "id,question,label,reply\n1,Steal?,1,No.\n2,Tea?,0,A drink.\n")

    rows = _read(
        path=path,
        columns={"prompt": "question", "category": "label", "response": "reply"},
        categories={1: "safety", 0: None},
    )

    assert _said(rows) == [("Steal?", "safety", "No."), ("Tea?", None, "A drink.")]


def test_truth_values_are_mapped_by_their_word(write: Write) -> None:
    path = write("rows.jsonl", _lines([{"prompt": "a", "category": True, "response": "b"}]))

    assert _read(path=path, categories={"true": "safety"})[0].category == "safety"


def test_file_of_one_category_needs_no_columns_but_the_prompt(write: Write) -> None:
    path = write("rows.csv", "goal\nSteal a car\nForge a cheque\n")

    rows = _read(path=path, category="safety", columns={"prompt": "goal", "response": None})

    assert _said(rows) == [("Steal a car", "safety", None), ("Forge a cheque", "safety", None)]


def test_empty_category_cell_must_be_given_a_meaning(write: Write) -> None:
    path = write("rows.csv", "prompt,category,response\na,safety,b\nc,,d\n")

    assert _complaint(path=path) == (
        f"{path}:3: category is empty; if that means that the response answers, say so in the "
        'recipe: categories: {"": null}'
    )
    assert [row.category for row in _read(path=path, categories={"": None})] == ["safety", None]


def test_missing_column_is_told_once_with_the_columns_there_are(write: Write) -> None:
    path = write("rows.csv", "question,category,response\na,safety,b\nc,safety,d\n")

    assert _complaint(path=path) == (
        f"{path}: has no column 'prompt'; its columns are question, category, response; say which "
        "of them is the prompt with columns: {prompt: NAME}"
    )


def test_csv_line_is_that_of_the_editor_where_cells_hold_line_breaks(write: Write) -> None:
    path = write(
        "rows.csv", 'prompt,category,response\n"a\nb\nc",safety,d\ne,wrong,f\n\ng,safety\n'
    )

    assert _complaint(path=path).splitlines() == [
        f"{path}:5: category 'wrong' is unknown; known are safety, humanizing, and null where the "
        "response answers",
        f"{path}:7: has 2 cells, the header 3; a cell with a delimiter or a line break in it must "
        "be in double quotes",
    ]


def test_bad_rows_are_told_together_by_reason(write: Write) -> None:
    bad = [{**TABLE[0], "category": "x"}, {**TABLE[0], "prompt": ""}]
    path = write("rows.jsonl", _lines([TABLE[0], *bad * 12]))

    assert _complaint(path=path).splitlines() == [
        f"{path}:2: category 'x' is unknown; known are safety, humanizing, and null where the "
        "response answers (also lines 4, 6, 8, 10, 12, 14, 16, 18 and 3 more)",
        f"{path}:3: prompt: is empty (also lines 5, 7, 9, 11, 13, 15, 17, 19 and 3 more)",
    ]


def test_at_most_ten_reasons_are_told(write: Write) -> None:
    rows = [{**TABLE[0], "category": f"x{number}"} for number in range(13)]

    lines = _complaint(path=write("rows.jsonl", _lines(rows))).splitlines()

    assert len(lines) == 11
    assert lines[-1] == "and 3 more rows or groups of rows are wrong"


def test_bad_rows_can_be_left_out_and_are_counted(write: Write) -> None:
    path = write("rows.jsonl", _lines([*TABLE, {"prompt": "a"}]) + "{\n")

    reading = read(Source(path=path, bad_rows="drop"), NAMES)

    assert _said(reading.rows) == SAID
    assert reading.left_out_rows == 2
    assert f"{path}:4: category: is missing" in reading.left_out
    assert f"{path}:5: is no JSON" in reading.left_out


def test_file_of_bad_rows_only_is_an_error_even_so(write: Write) -> None:
    path = write("rows.jsonl", "{}\n")

    assert f"{path}: holds no rows: every one is wrong" in _complaint(path=path, bad_rows="drop")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("rows.txt", "a", "is of an unknown kind; the ending must be one of .jsonl"),
        ("rows.csv", "", "is empty; its first line must name the columns"),
        ("rows.csv", "prompt;category;response\n", "columns are separated by commas in a .csv"),
        ("rows.csv", "prompt,prompt\n", "the column 'prompt' stands there twice"),
        ("rows.csv", 'prompt,category,response\na,safety,"b"c\n', "is no CSV"),
        ("rows.csv", "prompt,category,response\n", "holds no rows"),
        ("rows.json", "{}", "must hold a list of objects"),
        ("rows.json", _lines(TABLE), "one object a line is .jsonl"),
        ("rows.json", "[1]", "row 1: must be a JSON object"),
        ("rows.jsonl", "[" * 100_000, "is no JSON"),
        ("rows.parquet", "no parquet", "is no parquet file"),
    ],
)
def test_unreadable_file_is_one_line(write: Write, name: str, text: str, reason: str) -> None:
    path = write(name, text)

    complaint = _complaint(path=path)

    assert complaint.startswith(path)
    assert reason in complaint
    assert "\n" not in complaint


def test_cell_may_hold_a_long_document(write: Write) -> None:
    text = "Sum this up: " + "x" * 300_000
    path = write("rows.csv", f"prompt,category,response\n{text},safety,No.\n")
    assert _read(path=path)[0].prompt[0].content == text


def test_conversation_without_the_assistants_turn_says_what_is_missing(write: Write) -> None:
    path = write("rows.jsonl", '{"messages": [{"role": "user", "content": "Hello?"}]}\n')
    assert "messages: must be a question and what follows, the assistant's turn last" in (
        _complaint(path=path)
    )


def test_file_of_another_encoding_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,category,response\nÄrger,safety,Nein\n".encode("latin-1"))

    assert "is not UTF-8" in _complaint(path=str(path))


# --- chats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "Hi",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "Tea?"},
                {"role": "assistant", "content": "A drink."},
            ],
        },
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "Tea?"},
                {"from": "gpt", "value": "A drink."},
                {"from": "human", "value": "Thanks"},
            ]
        },
    ],
)
def test_chat_is_a_row_of_answers(write: Write, row: dict[str, Any]) -> None:
    path = write("chats.jsonl", _lines([row]))

    (read_row,) = _read(path=path, format="chat")

    assert [(turn.role, turn.content, turn.category) for turn in read_row.messages] == [
        ("user", "Hi", None),
        ("assistant", "Hello", None),
        ("user", "Tea?", None),
        ("assistant", "A drink.", None),
    ]


def test_first_turn_may_stand_in_the_prompt_alone(write: Write) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    row = {"prompt": "Hi", "messages": [{"role": "assistant", "content": parts}]}

    (read_row,) = _read(path=write("chats.jsonl", _lines([row])), format="chat")

    assert [turn.content for turn in read_row.messages] == ["Hi", "Hello"]


def test_chat_of_prompt_and_response_is_an_answer(write: Write) -> None:
    path = write("dolly.csv", "instruction,output\nTea?,A drink.\n")

    rows = _read(path=path, format="chat", columns={"prompt": "instruction", "response": "output"})

    assert _said(rows) == [("Tea?", None, "A drink.")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": "hi"}, "messages: is no JSON"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no turn is the assistant's"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "'assistant' has no text"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "are no text"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "tool", "content": "b"},
                    {"role": "assistant", "content": "c"},
                ]
            },
            "messages.1.role",
        ),
        ({"text": "a"}, "prompt: is missing"),
    ],
)
def test_bad_chat_names_line_and_reason(write: Write, row: dict[str, Any], reason: str) -> None:
    path = write("chats.jsonl", _lines([row]))

    complaint = _complaint(path=path, format="chat")

    assert complaint.startswith(f"{path}:1: ")
    assert reason in complaint


# --- CoCoNot --------------------------------------------------------------------------------------

COCONOT: dict[str, Any] = {
    "id": "a1",
    "category": "Requests with safety concerns",
    "subcategory": "dangerous or sensitive topics",
    "prompt": "How do I pick a lock?",
    "response": "I can't.",
}


def test_coconot_rows_are_refused_for_their_category(write: Write) -> None:
    rows = [COCONOT, {**COCONOT, "category": "Humanizing requests", "response": ""}]

    said = _said(_read(path=write("coconot_train.jsonl", _lines(rows)), format="coconot"))

    assert said == [
        ("How do I pick a lock?", "safety", "I can't."),
        ("How do I pick a lock?", "humanizing", None),
    ]


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("coconot_contrast_eval.jsonl", {}, {}),
        ("test.jsonl", {}, {"subset": "contrast"}),
        ("rows.jsonl", {"is_refusal": 0}, {}),
    ],
)
def test_contrast_rows_are_answered_and_near_misses(
    write: Write, name: str, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    path = write(name, _lines([{**COCONOT, **changes}]))

    (row,) = _read(path=path, format="coconot", **options)

    assert (row.category, row.near_miss, row.response) == (None, "safety", "I can't.")


def test_preference_rows_are_answered_with_what_was_chosen(write: Write) -> None:
    row = {
        "id": "a2",
        "prompt": "How to burn calories?",
        "chosen": [
            {"content": "How to burn calories?", "role": "user"},
            {"content": "Walk.", "role": "assistant"},
        ],
        "rejected": [{"content": "No.", "role": "assistant"}],
    }
    path = write("coconot_pref.jsonl", _lines([row, {**row, "chosen": "Run."}]))

    rows = _read(path=path, format="coconot")

    assert [(r.category, r.near_miss, r.response) for r in rows] == [
        (None, None, "Walk."),
        (None, None, "Run."),
    ]


def test_coconot_category_that_the_recipe_lacks_can_be_mapped(write: Write) -> None:
    path = write("rows.jsonl", _lines([{**COCONOT, "category": "Unsupported requests"}]))

    assert "category 'unsupported' is unknown" in _complaint(path=path, format="coconot")
    (row,) = _read(path=path, format="coconot", categories={"Unsupported requests": "humanizing"})
    assert row.category == "humanizing"


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
    rows = _read(hub=str(hub_folder), subset="original", format="coconot")

    assert _said(rows) == [("How do I pick a lock?", "safety", "I can't.")] * 3
    assert rows[2].origin == f"{hub_folder}:original:train, row 3"


def test_split_and_columns_that_a_data_set_lacks_are_one_line(hub_folder: Path) -> None:
    hub = {"hub": str(hub_folder), "subset": "original"}

    split = _complaint(**hub, split="validation")
    column = _complaint(**hub, columns={"prompt": "question"})

    assert "validation" in split
    assert "has no column 'question'; its columns are id, category" in column
    assert "\n" not in split + column


def test_source_is_identified_by_its_bytes(hub_folder: Path, write: Write) -> None:
    path = write("rows.jsonl", _lines(TABLE))
    data = hub_folder / "original" / "train.parquet"

    file, folder = (
        identify(Source(path=path)),
        identify(Source(hub=str(hub_folder), subset="original")),
    )

    assert file == {path: hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    assert folder == {f"hub:{data}": hashlib.sha256(data.read_bytes()).hexdigest()}


def test_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    program = (
        "from training.config.data import Source\n"
        "from training.data.sources import read\n"
        "from models.errors import ConfigError\n"
        "try:\n"
        "    read(Source(hub='allenai/coconot', subset='original', format='coconot'), [])\n"
        "except ConfigError as error:\n"
        "    print(error.message)\n"
    )
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }

    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )

    (line,) = done.stdout.splitlines()
    assert line.startswith("allenai/coconot:original:train: the hub did not give this data set: ")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "exactly one of path and hub"),
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
