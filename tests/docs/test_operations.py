"""docs/operations.md's tables, against what they describe."""

import re
from collections.abc import Iterator

import yaml
from prometheus_client import Counter, Gauge, Histogram

from server.telemetry import metrics
from tests.docs.test_readme import ROOT

TEXT = (ROOT / "docs" / "operations.md").read_text()
KINDS = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}


def table_of_metrics() -> Iterator[str]:
    yield "| metric | kind | labels | meaning |"
    yield "|---|---|---|---|"
    for metric in vars(metrics).values():
        if not isinstance(metric, Counter | Gauge | Histogram):
            continue
        (family,) = metric.describe()
        name = f"{family.name}_total" if isinstance(metric, Counter) else family.name
        labels = ", ".join(f"`{label}`" for label in metric._labelnames if label != metrics.MODEL)
        yield f"| `{name}` | {KINDS[type(metric)]} | {labels} | {family.documentation} |"


def test_table_of_metrics_is_current() -> None:
    table = "\n".join(table_of_metrics())
    assert table in TEXT, f"put this into docs/operations.md:\n{table}"


def test_each_alert_has_its_runbook() -> None:
    alerts = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yaml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    headings = re.findall(r"^#### (\w+)$", TEXT, re.MULTILINE)
    assert headings == [rule["alert"] for rule in rules]
    anchors = [f"docs/operations.md#{rule['alert'].lower()}" for rule in rules]
    assert [rule["annotations"]["runbook"] for rule in rules] == anchors
