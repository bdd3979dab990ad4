import pytest

from models.errors import EvaluationError
from tests.training.conftest import WriteRows, read_rows, small_rows
from training.measure.judge import Judge

NAMES = ("safety", "humanizing")


def test_judge_tells_kinds_of_unseen_texts_apart(write_rows: WriteRows) -> None:
    judge = Judge(read_rows(write_rows(small_rows()), NAMES))

    kinds = judge.kinds(
        ["I won't help to steal lamps.", "I'm an AI and cannot love lamps.", "Shops sell lamps."]
    )

    assert kinds == ["safety", "humanizing", "answer"]


def test_judge_reports_its_own_held_out_accuracy(write_rows: WriteRows) -> None:
    judge = Judge(read_rows(write_rows(small_rows()), NAMES))

    assert judge.accuracy.value is not None
    assert 0.9 <= judge.accuracy.value <= 1.0
    assert judge.accuracy.n == 32


def test_accuracy_is_unknown_where_a_kind_has_one_text(write_rows: WriteRows) -> None:
    rows = [row for row in small_rows() if row["category"] != "safety"]
    rows += [row for row in small_rows() if row["category"] == "safety"][:1] * 3

    assert Judge(read_rows(write_rows(rows), NAMES)).accuracy.value is None


def test_judge_of_no_texts_says_nothing(write_rows: WriteRows) -> None:
    assert Judge(read_rows(write_rows(small_rows()), NAMES)).kinds([]) == []


def test_rows_of_one_kind_cannot_teach_a_judge(write_rows: WriteRows) -> None:
    rows = [row for row in small_rows() if row["category"] is None]

    with pytest.raises(EvaluationError, match="only one kind"):
        Judge(read_rows(write_rows(rows), NAMES))


def test_rows_without_response_teach_the_judge_nothing(write_rows: WriteRows) -> None:
    rows = small_rows()
    silent = [{**row, "prompt": f"{row['prompt']}!", "response": None} for row in rows]

    judge = Judge(read_rows(write_rows([*rows, *silent]), NAMES))

    assert judge.accuracy == Judge(read_rows(write_rows(rows), NAMES)).accuracy
