"""Which figures of a report are shown, in which order, under which name."""

from typing import Any, NamedTuple

from pydantic import BaseModel

from training.evaluation.report import Report
from training.evaluation.statistics import Estimate


class Line(NamedTuple):
    """One figure.

    Attributes:
        path: Its path in gate files.
    """

    path: str
    label: str


class Section(NamedTuple):
    """Figures that belong together."""

    title: str
    lines: list[Line]


def lookup(report: Report, path: str) -> Any:
    """Returns what a dotted path names; a path may begin with a set's name.

    Raises:
        KeyError: With the names that stand where the path goes wrong.
    """
    parts = path.split(".")
    value: Any = report
    for part in ["sets", *parts] if parts[0] in report.sets else parts:
        fields = dict(value) if isinstance(value, (BaseModel, dict)) else {}
        if part not in fields:
            raise KeyError(f"{part!r} is none of {', '.join(fields) or 'nothing'}")
        value = fields[part]
    return value


def estimate(report: Report, path: str) -> Estimate:
    """Returns the estimate that a path of `sections` names."""
    found = lookup(report, path)
    assert isinstance(found, Estimate)
    return found


def sections(report: Report, most_cross_talk: int | None = None) -> list[Section]:
    """Returns the figures in the order in which they are shown.

    Args:
        most_cross_talk: Only so many pairs of categories, the largest changes.
    """
    names = report.categories
    sets = [name for name in report.sets if len(report.sets) > 2 or name != "all"]
    return [
        *(Section(f"Decisions on {name}", _set_lines(name, names)) for name in sets),
        Section("Dials", [Line("rates.largest_gap", "largest gap, requested to achieved rate")]),
        Section("Changed while a dial goes from 10 to 90 %", _cross_talk(report)[:most_cross_talk]),
        Section("Single token and category tokens", [*_mode("single"), *_mode("categories")]),
        Section("Decision rules", [line for rule in report.rules for line in _rule(rule)]),
        Section(
            "Refused in one way of asking, answered in the other",
            [
                Line(f"robustness.{name}.changed", name.replace("_", " "))
                for name in report.robustness
            ],
        ),
        Section("Texts", _text_lines(names)),
        Section("Who reads the texts as refusals", _reader_lines(report)),
        Section(
            "Computed decisions that the server confirms",
            [
                Line("agreement.scored", "all scored prompts"),
                Line("agreement.chat", "chat requests"),
                Line("agreement.dialled", "chat requests with a dial"),
                *(Line(f"rules.{rule}.agreement", f"rule {rule}") for rule in report.rules),
            ],
        ),
    ]


def _set_lines(name: str, categories: list[str]) -> list[Line]:
    return [
        Line(f"{name}.safe.refused", "falsely refused"),
        Line(f"{name}.near_misses.refused", "falsely refused, near misses"),
        Line(f"{name}.unsafe.refused", "refused of what should be"),
        *(Line(f"{name}.categories.{c}.refused", f"refused, {c}") for c in categories),
        Line(f"{name}.right_category", "right category among refused"),
        Line(f"{name}.f1", "F1"),
        Line(f"{name}.auc", "AUC"),
        Line(f"{name}.refused_at_5", "refused at 5 % false refusals"),
        Line(f"{name}.calibration_error", "calibration error"),
    ]


def _cross_talk(report: Report) -> list[Line]:
    lines = [
        Line(f"cross_talk.{moved}.{other}.changed", f"dial {moved}, prompts of {other}")
        for moved, others in report.cross_talk.items()
        for other in others
    ]
    return sorted(lines, key=lambda line: -(estimate(report, line.path).value or 0.0))


def _mode(mode: str) -> list[Line]:
    called = {"single": "one token", "categories": "category tokens"}[mode]
    return [
        Line(f"tokens.{mode}.safe", f"{called}: falsely refused"),
        Line(f"tokens.{mode}.unsafe", f"{called}: refused"),
        Line(f"tokens.{mode}.f1", f"{called}: F1"),
        Line(f"tokens.{mode}.refused_at_5", f"{called}: refused at 5 % false refusals"),
    ]


def _rule(rule: str) -> list[Line]:
    return [
        Line(f"rules.{rule}.safe", f"{rule}: falsely refused"),
        Line(f"rules.{rule}.unsafe", f"{rule}: refused"),
        Line(f"rules.{rule}.differ", f"{rule}: decided otherwise than by greedy"),
    ]


def _reader_lines(report: Report) -> list[Line]:
    return [
        *(Line(f"readers.by.{name}.refused", f"{name}: refused") for name in report.readers.by),
        *(
            Line(f"readers.pairs.{pair}.{figure}", f"{pair.replace('-', ' and ')}: {said}")
            for pair in report.readers.pairs
            for figure, said in (("agreement", "say the same"), ("kappa", "Cohen's kappa"))
        ),
    ]


def _text_lines(categories: list[str]) -> list[Line]:
    return [
        Line("texts.own_fidelity", "text does what the decision says"),
        Line("texts.flip_to_respond", "flip to respond"),
        *(Line(f"texts.flip_to_refuse.{c}", f"flip to refuse, {c}") for c in categories),
        Line("texts.right_answers", "right answers among answered"),
        Line("texts.grader_accuracy", "the grader's own accuracy"),
    ]
