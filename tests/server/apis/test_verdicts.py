import pytest

from server.apis.verdicts import Verdicts
from server.context import Decision
from tests.server.contexts import context_of_calls
from tests.server.manifests import MANIFEST

RESPOND = Decision(None)
SAFETY = Decision(0, (1.0, -1.0))
HUMANIZING = Decision(1)


def verdicts(
    decisions: dict[tuple[int, int], Decision],
    *,
    report: bool = False,
    beams: bool = False,
    choices_per_prompt: int = 1,
) -> Verdicts:
    context = context_of_calls(decisions, report=report, beam_search=beams)
    context.refusal_texts = {place: str(place) for place in decisions}
    return Verdicts(MANIFEST, context, choices_per_prompt=choices_per_prompt)


def test_undecided_choice_is_neither_answer_nor_refusal() -> None:
    nothing = verdicts({}, report=True)
    assert not nothing.decided()
    assert nothing.category() is None
    assert nothing.report() is None
    assert nothing.take_text() is None
    assert not nothing.any_refusal
    assert nothing.in_order() == []


def test_choices_of_one_prompt_are_told_by_their_index() -> None:
    told = verdicts({(0, 0): RESPOND, (0, 1): SAFETY})
    assert [told.category(index) for index in (0, 1)] == [None, "safety"]
    assert told.in_order() == [None, "safety"]
    assert told.any_refusal


def test_choices_of_several_prompts_are_numbered_through() -> None:
    decisions = {(0, 0): RESPOND, (0, 1): SAFETY, (1, 0): HUMANIZING, (1, 1): RESPOND}
    told = verdicts(decisions, choices_per_prompt=2)
    assert [told.category(index) for index in range(4)] == [None, "safety", "humanizing", None]
    assert told.take_text(2) == "(1, 0)"


def test_all_beams_share_one_decision() -> None:
    told = verdicts({(0, 0): SAFETY}, beams=True)
    assert [told.category(index) for index in (0, 1, 5)] == ["safety"] * 3


def test_text_is_taken_once() -> None:
    told = verdicts({(0, 0): SAFETY})
    assert told.take_text() == "(0, 0)"
    assert told.take_text() is None


@pytest.mark.parametrize(("report", "reported"), [(True, True), (False, False)])
def test_report_is_given_where_it_was_asked_for(report: bool, reported: bool) -> None:
    told = verdicts({(0, 0): SAFETY, (0, 1): HUMANIZING}, report=report)
    assert (told.report(0) is not None) is reported
    assert told.report(1) is None, "a decision without margins has no report"
