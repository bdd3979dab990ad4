"""docker/prometheus and docker/grafana by Debian's promtool; tests/e2e has them on real traffic."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.prometheus import FOLDER, RULES, binary

TESTS = Path(__file__).with_name("alerts.yaml")
GRAFANA = FOLDER.parent / "grafana"


def promtool(*arguments: object) -> None:
    command = [binary("promtool"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_and_rules_pass_promtools_check() -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", FOLDER / "prometheus.yaml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


def test_alerts_fire_when_they_should_and_not_before() -> None:
    promtool("test", "rules", TESTS)


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    return list(group["rules"])


def test_each_alert_is_tested_both_ways() -> None:
    cases = [
        case
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    rests = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert fires == rests == {alert["alert"] for alert in alerts()}


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "rheostat.json").read_text())
    return read


def test_dashboard_names_no_data_source_of_a_site() -> None:
    sources = [target["datasource"] for panel in dashboard()["panels"] for target in targets(panel)]
    assert sources
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    variables = {each["name"]: each["type"] for each in dashboard()["templating"]["list"]}
    assert variables == {"datasource": "datasource", "job": "query", "model_name": "query"}


def targets(panel: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = panel.get("targets", [])
    return found


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (place["x"] + right, place["y"] + down)
            for right in range(place["w"])
            for down in range(place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells


@pytest.mark.parametrize(
    "file", sorted(GRAFANA.glob("provisioning/*/*.yaml")), ids=lambda f: f.stem
)
def test_provisioning_is_yaml_of_the_first_version(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["apiVersion"] == 1
