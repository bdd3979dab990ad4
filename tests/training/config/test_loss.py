"""What `loss` in a recipe may say, and the one line that tells what is wrong with it."""

from typing import Any

import pytest
from pydantic import ValidationError

from training.config.loss import DecisionLoss, GammaSchedule, LossConfig, QSchedule, TextLoss

MUST_BE = "must be a number, a schedule with start, end and over, a number for each category, or"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"q": 1}, DecisionLoss(q=1.0)),
        (
            {"q": {"start": 0, "end": 1.5, "over": 0.5}},
            DecisionLoss(q=QSchedule(start=0, end=1.5, over=0.5)),
        ),
        ({"gamma": {"start": 5, "end": 0}}, DecisionLoss(gamma=GammaSchedule(start=5, end=0))),
        (
            {"gamma": {"safety": 3, "respond": 0.5}},
            DecisionLoss(gamma={"safety": 3.0, "respond": 0.5}),
        ),
        ({"q": "auto"}, DecisionLoss(q="auto", gamma="auto")),
        ({"gamma": "auto"}, DecisionLoss(q="auto", gamma="auto")),
    ],
)
def test_every_form_is_read_and_survives_being_written(
    given: dict[str, Any], expected: DecisionLoss
) -> None:
    config = LossConfig.model_validate({"decision": given})
    assert config.decision == expected
    assert LossConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("given", "place", "reason"),
    [
        ({"q": 3}, "number", "less than or equal to 2"),
        ({"q": -1.5}, "number", "greater than or equal to -1"),
        ({"gamma": 5.1}, "number", "less than or equal to 5"),
        ({"q": "automatic"}, "q", MUST_BE),
        ({"q": None}, "q", MUST_BE),
        ({"gamma": [1]}, "gamma", MUST_BE),
        ({"q": {"start": 0}}, "end", "required"),
        ({"q": {"start": 0, "end": 2.5}}, "end", "less than or equal to 2"),
        ({"q": {"start": 0, "end": 1, "over": 0}}, "over", "greater than 0"),
        ({"gamma": {"start": 0, "end": 1, "untill": 1}}, "untill", "Extra inputs"),
        ({"gamma": {"safety": -1}}, "safety", "greater than or equal to 0"),
        ({"q": {"Safety!": 1}}, "Safety!", "should match pattern"),
        ({"q": "auto", "gamma": 1.0}, "decision", "make gamma auto too, or leave it out"),
        ({"q": {"safety": 1}, "gamma": "auto"}, "decision", "make q auto too, or leave it out"),
    ],
)
def test_one_wrong_field_is_one_error(given: dict[str, Any], place: str, reason: str) -> None:
    with pytest.raises(ValidationError) as raised:
        LossConfig.model_validate({"decision": given})
    (error,) = raised.value.errors()
    assert place in error["loc"]
    assert reason in error["msg"] or error["type"] == "missing"


@pytest.mark.parametrize("given", ["auto", {"safety": 1.0}])
def test_text_has_neither_categories_nor_auto(given: object) -> None:
    with pytest.raises(ValidationError) as raised:
        TextLoss.model_validate({"q": given})
    (error,) = raised.value.errors()
    assert error["loc"] == ("q",) or error["loc"][-1] == "q"
    assert "must be a number or a schedule" in error["msg"]
