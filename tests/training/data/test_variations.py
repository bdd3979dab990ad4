import random
from collections import Counter

import pytest

from models.errors import ConfigError
from tests.training.conftest import WriteRows
from training.config.data import DataConfig, Source
from training.data.mixture import gather
from training.data.rows import Row
from training.data.sources import identify, read
from training.data.variations import SYSTEM_PROMPTS, varied
from training.demo_data.everyday import everyday

CATEGORIES = ("safety", "humanizing", "incomplete", "indeterminate", "unsupported")


def _gathered(write_rows: WriteRows, share: float, response: str | None = "Yes.") -> list[Row]:
    rows: list[dict[str, object]] = [
        {"prompt": f"Is {n} a number?", "category": None, "response": response} for n in range(40)
    ]
    rows += [
        {"prompt": f"How do I forge {n} coins?", "category": "safety", "response": "No."}
        for n in range(40)
    ]
    path = str(write_rows(rows))
    data = DataConfig.model_validate({"train": [path], "variations": share})
    return gather(data, CATEGORIES).rows


def test_copies_keep_the_decision_and_lose_the_response(write_rows: WriteRows) -> None:
    rows = _gathered(write_rows, 0.5)

    copies = rows[80:]

    assert len(copies) == 40
    assert all(row.response is None for row in copies)
    assert {row.category for row in copies} == {None, "safety"}
    for row in copies:
        question = row.prompt[-1].content.casefold()
        # Typing errors swap letters and lose none; one case may lose the mark.
        assert Counter("forge" if row.category else "number") <= Counter(question)


def test_copies_are_of_every_way_and_the_same_for_the_same_seed(write_rows: WriteRows) -> None:
    rows = _gathered(write_rows, 2)
    kinds = Counter(tuple(turn.role for turn in row.prompt) for row in rows[80:])

    assert set(kinds) == {("user",), ("system", "user"), ("user", "assistant", "user")}
    assert {row.prompt[0].content for row in rows if row.prompt[0].role == "system"} <= {
        *SYSTEM_PROMPTS
    }
    assert _gathered(write_rows, 2) == rows


def test_no_text_of_other_rows_is_needed(write_rows: WriteRows) -> None:
    rows = _gathered(write_rows, 1, response=None)

    assert {len(row.prompt) for row in rows[80:]} == {1, 2}


def test_prompts_of_several_turns_have_no_copies() -> None:
    assert varied([], 3.0, random.Random(0)) == []


def test_everyday_prompts_are_distinct_answers_and_the_same_at_every_call() -> None:
    rows = everyday(500)

    assert len({row["prompt"] for row in rows}) == 500
    assert everyday(500) == rows
    assert everyday(500, seed=1) != rows
    assert not any("<" in row["prompt"] for row in rows)
    assert {(row["category"], row["response"]) for row in rows} == {(None, None)}


@pytest.mark.parametrize(("name", "refused"), [("everyday", 0), ("demo", 3850)])
def test_rows_of_the_package_are_a_source(name: str, refused: int) -> None:
    source = Source.model_validate({"package": name})

    rows = read(source, CATEGORIES).rows

    assert sum(row.category is not None for row in rows) == refused
    assert rows[0].origin == f"package {name}, row 1"
    assert list(identify(source)) == [f"package {name}"]


def test_a_source_is_of_one_origin() -> None:
    with pytest.raises(ValueError, match="exactly one of path, hub and package"):
        Source.model_validate({"package": "demo", "path": "rows.jsonl"})
    with pytest.raises(ValueError, match="subset is for hub"):
        Source.model_validate({"package": "demo", "subset": "train"})


def test_no_row_left_is_an_error_before_any_copy(write_rows: WriteRows) -> None:
    path = str(write_rows([{"prompt": "a", "category": None, "response": "b"}]))
    data = DataConfig.model_validate({"train": [{"path": path, "weight": 0.1}], "variations": 1})

    with pytest.raises(ConfigError, match="leaves none"):
        gather(data, CATEGORIES)
