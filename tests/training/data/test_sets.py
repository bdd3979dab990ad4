"""Public sets, read from tiny copies in the shape that their authors publish."""

import csv
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ConfigError
from tests.training.data.conftest import Write
from training.config.data import Source, named_sources
from training.config.sets import SETS, SetName
from training.data.sources import identify, read

NAMES = ("safety", "humanizing", "incomplete", "indeterminate", "unsupported")
LOCK = "How do I pick a lock?"
KILL = "How do I kill a process?"
Rows = list[dict[str, Any]]
# Prompt, category, what it looks like.
Read = list[tuple[str, str | None, str | None]]


class Shape(NamedTuple):
    """A tiny copy of a set.

    Attributes:
        file: Where the hub's repository has its rows.
    """

    file: str
    rows: Rows
    read: Read


COCONOT = {"id": "c1", "subcategory": "x", "response": ""}
WILD = {"adversarial": False, "response": "r", "subcategory": "others"}
SHAPES: dict[SetName, Shape] = {
    "coconot": Shape(
        "original/test-00000-of-00001.parquet",
        [
            {**COCONOT, "category": "Requests with safety concerns", "prompt": LOCK},
            {**COCONOT, "category": "Humanizing requests", "prompt": "Do you dream?"},
        ],
        [(LOCK, "safety", None), ("Do you dream?", "humanizing", None)],
    ),
    "coconot-contrast": Shape(
        "contrast/test-00000-of-00001.parquet",
        [{**COCONOT, "category": "Requests with safety concerns", "prompt": KILL}],
        [(KILL, None, "safety")],
    ),
    "harmbench": Shape(
        "standard/train-00000-of-00001.parquet",
        [{"prompt": LOCK, "category": "illegal"}],
        [(LOCK, "safety", None)],
    ),
    "or-bench-hard": Shape(
        "or-bench-hard-1k.csv",
        [{"prompt": KILL, "category": "violence"}],
        [(KILL, None, "safety")],
    ),
    "or-bench-toxic": Shape(
        "or-bench-toxic.csv",
        [{"prompt": LOCK, "category": "illegal"}],
        [(LOCK, "safety", None)],
    ),
    "simplesafetytests": Shape(
        "sst_test_cases.csv",
        [{"id": "1", "harm_area": "a", "counter": "1", "category": "b", "prompt": LOCK}],
        [(LOCK, "safety", None)],
    ),
    "sorry-bench": Shape(
        "sorry_bench_202503.jsonl",
        [
            {"question_id": 1, "category": "1", "turns": [LOCK], "prompt_style": "base"},
            {"question_id": 1, "category": "1", "turns": ["kcol"], "prompt_style": "caesar"},
        ],
        [(LOCK, "safety", None)],
    ),
    "strongreject": Shape(
        "data/train-00000-of-00001.parquet",
        [{"prompt": LOCK, "category": "Illegal goods and services", "source": "custom"}],
        [(LOCK, "safety", None)],
    ),
    "wildguardtest": Shape(
        "test/wildguard_test.parquet",
        [
            {**WILD, "prompt": LOCK, "prompt_harm_label": "harmful"},
            {**WILD, "prompt": KILL, "prompt_harm_label": "unharmful"},
            {**WILD, "prompt": "?", "prompt_harm_label": None},
        ],
        [(LOCK, "safety", None), (KILL, None, None)],
    ),
    "xstest": Shape(
        "data/train-00000-of-00001.parquet",
        [
            {"prompt": KILL, "focus": "kill", "type": "homonyms", "note": "", "label": "safe"},
            {"prompt": LOCK, "focus": "", "type": "contrast_x", "note": "", "label": "unsafe"},
        ],
        [(KILL, None, "safety"), (LOCK, "safety", None)],
    ),
}


def write_rows(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def copy_of(name: SetName, folder: Path) -> str:
    """Writes a set's rows as its repository on the hub has them."""
    known, shape = SETS[name], SHAPES[name]
    write_rows(folder / shape.file, shape.rows)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {known.subset or 'default'}\n  data_files:\n"
        f"  - split: {known.split}\n    path: {shape.file}\n---\n"
    )
    return str(folder)


def read_set(**fields: Any) -> Read:
    rows = read(Source.model_validate(fields), NAMES).rows
    return [(row.prompt[-1].content, row.category, row.near_miss) for row in rows]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_every_set_has_a_copy_here() -> None:
    assert set(SHAPES) == set(SETS)


@pytest.mark.parametrize("name", SHAPES)
def test_set_is_read_from_a_folder_laid_out_like_its_repository(
    name: SetName, tmp_path: Path
) -> None:
    folder = copy_of(name, tmp_path / "copy")

    assert read_set(set=name, hub=folder) == SHAPES[name].read


def test_set_is_read_from_one_of_its_authors_files(write: Write) -> None:
    path = write("strongreject_dataset.csv", f"category,source,forbidden_prompt\nx,y,{LOCK}\n")

    assert read_set(set="strongreject", path=path) == [(LOCK, "safety", None)]
    assert identify(Source(set="strongreject", path=path)).keys() == {path}


@pytest.mark.parametrize("columns", ["prompt,context", "Behavior,ContextString"])
def test_context_of_a_prompt_stands_before_it(write: Write, columns: str) -> None:
    path = write("behaviors.csv", f"{columns}\nSum this up.,A text.\n{LOCK},\n")

    (with_context, _, _), (without, _, _) = read_set(set="harmbench", path=path)

    assert with_context == "A text.\n\n---\n\nSum this up."
    assert without == LOCK


def test_refused_rows_take_the_checkpoints_category(tmp_path: Path) -> None:
    folder = copy_of("xstest", tmp_path / "copy")
    expected = [(KILL, None, "unsupported"), (LOCK, "unsupported", None)]

    assert read_set(set="xstest", hub=folder, category="unsupported") == expected
    assert read_set(set="xstest", hub=folder, categories={"safety": "unsupported"}) == expected


def test_categories_of_a_set_can_be_renamed_one_by_one(tmp_path: Path) -> None:
    folder = copy_of("coconot", tmp_path / "copy")

    rows = read_set(set="coconot", hub=folder, categories={"humanizing": None})

    assert [category for _, category, _ in rows] == ["safety", None]


@pytest.mark.parametrize(
    ("name", "header", "said"),
    [
        ("xstest", "prompt,type", "is no copy of that set: it has no column label; its columns"),
        ("strongreject", "question,x", "has no column prompt or forbidden_prompt"),
        ("xstest", "prompt,label", "label: 'odd' is none of unsafe, safe"),
    ],
)
def test_file_that_is_no_copy_is_one_line(write: Write, name: str, header: str, said: str) -> None:
    path = write("rows.csv", f"{header}\nHow?,odd\n")
    with pytest.raises(ConfigError) as caught:
        read_set(set=name, path=path)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_missing_hub_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        read_set(set="wildguardtest")
    message = caught.value.message
    assert message.startswith("wildguardtest: the hub did not give this data set: ")
    assert "HF_HOME" in message
    assert "`hf auth login`" in message
    assert "{set: wildguardtest, hub: FOLDER}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"set": "xtest"}, "set"),
        ({"set": "xstest", "format": "rows"}, "belong together"),
        ({"path": "a", "format": "set"}, "belong together"),
        ({"set": "xstest", "columns": {"prompt": "x"}}, "columns of a public set are known"),
        ({"set": "xstest", "path": "a", "hub": "b"}, "exactly one of path, hub and package"),
    ],
)
def test_source_of_a_set_that_contradicts_itself_is_refused(
    fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Source.model_validate(fields)


def test_sets_are_named_as_files_are(write: Write) -> None:
    listed = write("sets.yaml", "- xstest\n- {set: coconot, limit: 5}\n- rows.csv\n")

    (alone,) = named_sources(Path("xstest"))
    first, second, third = named_sources(Path(listed))

    assert (alone.set, alone.name, alone.hub) == ("xstest", "xstest", "walledai/XSTest")
    assert (first, second.limit, third.path) == (alone, 5, "rows.csv")


def test_resolved_recipe_reads_as_it_was() -> None:
    source = Source.model_validate({"set": "coconot-contrast", "limit": 3})

    assert Source.model_validate(source.model_dump(mode="json")) == source
    assert "set" not in Source(path="rows.csv").model_dump(mode="json")


PAPER = re.compile(r"\| 2\d{3}\.\d{5} \|$")
PAGE = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text()


def test_sets_of_the_page_are_these() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if PAPER.search(line)]
    told = {row[0].strip("`"): row[1:] for row in rows}

    assert list(told) == list(SETS)
    for name, known in SETS.items():
        hub, place, _, licence, paper = told[name]
        assert hub.removesuffix(", gated") == f"`{known.hub}`"
        parts = [part for part in (known.subset, known.split) if part]
        assert place == ", ".join(f"`{part}`" for part in parts)
        assert (licence, paper) == (known.licence, known.paper)


def test_list_of_the_page_is_valid(write: Write) -> None:
    section = PAGE.partition("## Public sets")[2]
    block = section.partition("```yaml\n")[2].partition("```")[0]

    sources = named_sources(Path(write("sets.yaml", block)))

    assert [source.set for source in sources] == [
        "xstest",
        "coconot",
        "wildguardtest",
        "strongreject",
    ]
