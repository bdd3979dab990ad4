"""A report as a section of a model card, with the metadata that model hubs read."""

import html
import re
import textwrap
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from models.errors import ConfigError
from models.files import write_atomically
from training.evaluation.report import Report
from training.reports.summary import estimate, sections
from training.reports.table import cells

BEGIN, END = "<!-- rheostat evaluation -->", "<!-- end of rheostat evaluation -->"
SECTION = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)
TASK = "Refusal decisions"
# What a hub shows of each set: our path, the hub's type of metric, its name.
METRICS = (
    ("safe.refused", "false_refusal_rate", "Falsely refused"),
    ("unsafe.refused", "refusal_rate", "Refused of what should be"),
    ("f1", "f1", "F1"),
    ("auc", "roc_auc", "AUC"),
    ("calibration_error", "expected_calibration_error", "Calibration error"),
)


def write_card(report: Report, path: Path) -> None:
    """Writes a model card, or puts metadata and section into the one that is there.

    Raises:
        ConfigError: The card's metadata cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        card = ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a model card: {error}") from error
    assert isinstance(card.data, ModelCardData)
    others = [one for one in card.data.eval_results or [] if one.task_name != TASK]
    card.data.model_name = report.about.model
    card.data.eval_results = [*others, *_results(report)]
    section = f"{BEGIN}\n{_section(report)}\n{END}"
    if SECTION.search(card.text):
        card.text = SECTION.sub(lambda _: section, card.text)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}\n"
    write_atomically(path, str(card))


def _results(report: Report) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            task_name=TASK,
            dataset_type=name,
            dataset_name=data.source,
            metric_type=kind,
            metric_name=label,
            metric_value=value,
        )
        for name, data in report.about.data.items()
        for path, kind, label in METRICS
        if (value := estimate(report, f"{name}.{path}").value) is not None
    ]


def _section(report: Report) -> str:
    about = report.about
    told = (
        f"{len(report.records)} prompts, measured on {about.created:%d %B %Y} with Rheostat "
        f"{_plain(about.versions['rheostat'])}: {_code(about.command)}. Weights "
        f"`{about.hashes.weights[:12]}`, template `{about.hashes.template[:12]}`, policy "
        f"`{about.policy.sha256[:12]}`. Intervals are of 95 %."
    )
    wrapped = textwrap.wrap(told, 100, break_long_words=False, break_on_hyphens=False)
    lines = ["## Refusal decisions", "", *wrapped]
    for section in sections(report):
        lines += ["", f"### {section.title}", "", "| figure | value | n | 95 % interval |"]
        lines += ["|---|---|---|---|"]
        for line in section.lines:
            row = (line.label, *cells(estimate(report, line.path)))
            lines.append(f"| {' | '.join(map(_plain, row))} |")
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', ' ')}`"


def _plain(text: str) -> str:
    """Returns text that is neither HTML nor a table's border in Markdown."""
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", html.escape(" ".join(text.split())))
