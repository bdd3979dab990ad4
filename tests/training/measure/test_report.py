import json
import math

import numpy as np
import pytest
from rich.console import Console

from models.errors import EvaluationError
from training.measure.report import (
    Outcome,
    Share,
    measure,
    refusal_auc,
    refusal_scores,
)

# Rows: two of "a" (one missed), one of "b" refused as "a", three to answer (one refused).
OUTCOMES = [
    Outcome("a", None, [2.0, -1.0], "a", "no", "a", "answer", "answer"),
    Outcome("a", None, [-1.0, -3.0], None, "It is Paris.", "answer", "b", "b"),
    Outcome("b", None, [3.0, 2.0], "a", "no", "a", "answer", "a"),
    Outcome(None, "Paris", [-4.0, -4.0], None, "It is PARIS.", "answer", "b", "a"),
    Outcome(None, "Paris", [-2.0, -5.0], None, "Rome", "a", "a", "a"),
    Outcome(None, "Paris", [-6.0, 1.0], "b", "no", "b", "answer", "answer"),
]


def test_report_counts_what_was_refused() -> None:
    report = measure(["a", "b"], OUTCOMES)

    assert report.rows == 6
    assert report.refused == {"a": Share(1, 2), "b": Share(1, 1)}
    assert report.refused_in_all == Share(2, 3)
    assert report.falsely_refused == Share(1, 3)
    assert report.right_category == Share(1, 2)


def test_right_answers_count_among_the_answered_whatever_the_case() -> None:
    # Row 4 holds it, row 5 does not, row 6 was refused, row 2 has no known answer.
    assert measure(["a", "b"], OUTCOMES).right_answers == Share(1, 2)


def test_flips_count_in_both_directions() -> None:
    report = measure(["a", "b"], OUTCOMES)

    assert report.own_fidelity == Share(5, 6)
    assert report.flip_to_respond == Share(2, 3)
    assert report.flip_to_refuse == {"a": Share(1, 1), "b": Share(1, 2)}


def test_margins_are_those_of_the_categorys_own_rows() -> None:
    margins = measure(["a", "b"], OUTCOMES).margins

    assert margins["a"]["0"] == -1.0
    assert margins["a"]["0.5"] == 0.5
    assert margins["a"]["1"] == 2.0
    assert margins["b"] == dict.fromkeys(margins["b"], 2.0)


def test_score_is_the_log_odds_of_refusing_at_all() -> None:
    scores = refusal_scores(np.array([[0.0, 0.0], [-1000.0, -1000.0], [1000.0, 0.0]]))

    assert scores == pytest.approx([math.log(2), -1000 + math.log(2), 1000])


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    # Scores 3, 1 to refuse and 2, 1, 0 to answer: right are 3 + 1 and a tie of a half, of 6.
    margins = np.array([[3.0], [1.0], [2.0], [1.0], [0.0]])

    assert refusal_auc(margins, [True, True, False, False, False]) == pytest.approx(4.5 / 6)


def test_auc_of_one_sort_of_rows_is_unknown() -> None:
    assert refusal_auc(np.array([[1.0], [2.0]]), [True, True]) is None


def test_interval_of_all_and_of_nothing() -> None:
    assert Share(5, 5).interval == pytest.approx((0.025 ** (1 / 5), 1.0))
    assert Share(0, 0).interval == (0.0, 1.0)


def test_report_survives_json() -> None:
    report = json.loads(measure(["a", "b"], OUTCOMES, judge_accuracy=0.9).to_json())

    assert report["falsely_refused"]["hits"] == 1
    assert report["falsely_refused"]["value"] == pytest.approx(1 / 3)
    assert report["falsely_refused"]["interval"][0] == pytest.approx(0.0084, abs=1e-4)
    assert report["refused"]["a"]["total"] == 2
    assert report["judge_accuracy"] == 0.9


def test_table_shows_each_measure() -> None:
    console = Console(width=120)

    with console.capture() as captured:
        console.print(measure(["a", "b"], OUTCOMES).table())

    text = captured.get()
    assert "falsely refused" in text
    assert "33.3%" in text
    assert "1 / 3" in text


def test_no_rows_are_an_error() -> None:
    with pytest.raises(EvaluationError, match="no rows"):
        measure(["a"], [])
