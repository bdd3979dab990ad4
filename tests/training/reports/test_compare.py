import json
from pathlib import Path

import pytest
from rich.console import Console
from scipy.stats import binomtest

from models.errors import EvaluationError
from tests.training.evaluated import small_report
from training.evaluation.report import Record, Report
from training.reports.compare import compare, comparison_table

SMALL = small_report()


def with_records(records: list[Record]) -> Report:
    return SMALL.model_copy(update={"records": records})


def answering(*places: int) -> Report:
    """Returns the report of a model that answers some prompts that the other refuses."""
    records = list(SMALL.records)
    for place in places:
        fewer = {"decided": None, "margins": [-1.0, -1.0]}
        records[place] = records[place].model_copy(update=fewer)
    return with_records(records)


def refusing(report: Report, *places: int) -> Report:
    records = list(report.records)
    for place in places:
        more = {"decided": "safety", "margins": [1.0, -1.0]}
        records[place] = records[place].model_copy(update=more)
    return with_records(records)


def test_report_does_not_differ_from_itself() -> None:
    found = compare(SMALL, SMALL)

    assert (found.paired, found.unpaired) == (32, 0)
    for difference in found.sets["all"].values():
        assert (difference.change.value, difference.change.low, difference.change.high) == (0, 0, 0)
        assert difference.p_value in (None, 1.0)


def test_flips_are_tested_in_pairs() -> None:
    # Rows 0, 4, 8, 12, 16 should be refused for safety; 2 and 3 should be answered.
    other = refusing(answering(0, 4, 8, 12, 16), 2, 3)

    found = compare(SMALL, other).sets["all"]

    wanted = found["refused of what should be"]
    assert wanted.first == 1.0
    assert wanted.second == pytest.approx(11 / 16)
    assert (wanted.only_first, wanted.only_second) == (5, 0)
    assert wanted.p_value == pytest.approx(binomtest(5, 5).pvalue)
    assert wanted.change.value == pytest.approx(-5 / 16)
    assert wanted.change.high is not None
    assert wanted.change.high < 0
    assert found["refused, safety"].change.value == pytest.approx(-5 / 8)
    assert found["refused, humanizing"].change.value == 0
    assert found["falsely refused"].only_second == 2
    assert found["F1"].second == pytest.approx(2 * 11 / (2 * 11 + 2 + 5))
    assert (found["AUC"].change.value or 0.0) < 0


def test_the_other_way_round_only_the_sign_changes() -> None:
    other = answering(0, 4, 8)
    there, back = compare(SMALL, other).sets["all"], compare(other, SMALL).sets["all"]

    for name, difference in there.items():
        assert difference.change.value == pytest.approx(-(back[name].change.value or 0.0))
        assert difference.change.low == pytest.approx(-(back[name].change.high or 0.0))
        assert difference.p_value == back[name].p_value


def test_only_prompts_of_both_reports_are_paired() -> None:
    relabelled = SMALL.records[0].model_copy(update={"category": "humanizing"})

    found = compare(
        with_records(SMALL.records[:20]), with_records([relabelled, *SMALL.records[1:]])
    )

    assert (found.paired, found.unpaired) == (19, 14)


def test_prompt_that_occurs_twice_is_paired_twice() -> None:
    double = with_records([*SMALL.records, SMALL.records[0]])

    assert compare(double, double).paired == 33
    assert compare(double, SMALL).unpaired == 1


def test_reports_of_other_prompts_cannot_be_compared() -> None:
    other = [record.model_copy(update={"sha256": "0" * 64}) for record in SMALL.records]

    with pytest.raises(EvaluationError, match="share no prompt"):
        compare(SMALL, with_records(other))


def test_safe_prompts_alone_have_no_f1() -> None:
    safe = with_records([record for record in SMALL.records if record.category is None])

    found = compare(safe, safe)

    assert found.sets["all"]["F1"].change.value is None
    assert json.loads(found.to_json())["sets"]["all"]["AUC"]["change"]["reason"]


def test_table_shows_values_interval_and_test() -> None:
    console = Console(width=140)
    with console.capture() as captured:
        console.print(comparison_table(compare(SMALL, answering(0)), (Path("a"), Path("b"))))

    assert "0.9375" in captured.get()
    assert "-0.0625" in captured.get()
    assert "McNemar" in captured.get()
