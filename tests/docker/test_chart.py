"""The Helm chart in Helm's own library, its objects against Kubernetes' own schemas."""

import json
import re
import shlex
import tarfile
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import helm_python
import jsonschema_rs
import kubernetes_validate
import pytest
import yaml

from server.settings import PREFIX, Settings
from server.web.access import ROUTES, Access
from tests.docker import chart

CRD_SCHEMAS = Path(__file__).with_name("schemas")
DOCKERFILE = (chart.ROOT / "Dockerfile").read_text()
FILES_OF_RULES = ("recording", "alerts")
POLICIES = (chart.ROOT / "examples" / "policies.yaml").read_text()
EVERYTHING: dict[str, Any] = {
    "image": {"repository": "registry.example.com/rheostat", "digest": f"sha256:{'0' * 64}"},
    "imagePullSecrets": [{"name": "registry"}],
    "model": {"volume": {"nfs": {"server": "nfs", "path": "/m"}}, "subPath": "demo"},
    "args": ["--tensor-parallel-size=2"],
    "env": [{"name": "VLLM_CPU_KVCACHE_SPACE", "value": "4"}],
    "policies": {"file": POLICIES},
    "operatorKeyHash": {"secret": "operator"},
    "resources": {"limits": {"nvidia.com/gpu": 2}},
    "cache": {"claim": "kernels"},
    "podDisruptionBudget": {"maxUnavailable": "25%"},
    "autoscaling": {"enabled": True},
    "networkPolicy": {"egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}]},
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "rules": {"enabled": True, "labels": {"release": "prometheus"}},
        "dashboard": {"enabled": True},
    },
    "serviceAccount": "rheostat",
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "models"},
    "runtimeClassName": "nvidia",
    "priorityClassName": "high",
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "initContainers": [{"name": "fetch", "image": "fetch:1"}],
    "volumes": [{"name": "more", "emptyDir": {}}],
    "volumeMounts": [{"name": "more", "mountPath": "/more"}],
    "extraManifests": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-1"}},
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {{ .Release.Name }}-2\n",
    ],
}
CASES = {
    "defaults": {},
    "everything": EVERYTHING,
    "keda": {"autoscaling": {"enabled": True, "by": "keda"}},
    "policies of a ConfigMap": {"policies": {"configMap": "ours"}},
    "policies of a Secret": {"policies": {"secret": "ours"}},
}


def of_kind(kind: str, values: dict[str, Any] | None = None) -> Any:
    (found,) = [one for one in chart.manifests(values) if one["kind"] == kind]
    return found


def pod(values: dict[str, Any] | None = None) -> Any:
    return of_kind("Deployment", values)["spec"]["template"]["spec"]


def container(values: dict[str, Any] | None = None) -> Any:
    (found,) = pod(values)["containers"]
    return found


def variables(values: dict[str, Any] | None = None) -> dict[str, Any]:
    return {one["name"]: one.get("value") for one in container(values)["env"]}


def crd_schema(kind: str) -> Path:
    return CRD_SCHEMAS / f"{kind.lower()}.json"


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_helm_lint_finds_nothing(values: dict[str, Any]) -> None:
    report = helm_python.lint(chart.CHART, values, strict=True)
    assert report["errors"] == []
    assert [one["error"] for one in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("version", ["1.27", "1.37"])
@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_objects_are_what_kubernetes_takes(values: dict[str, Any], version: str) -> None:
    for one in chart.manifests(values):
        if crd_schema(one["kind"]).exists():
            jsonschema_rs.validate(json.loads(crd_schema(one["kind"]).read_text()), one)
        else:
            kubernetes_validate.validate(one, version, strict=True)


def test_schemas_reject_a_field_that_does_not_exist() -> None:
    deployment, scaled = of_kind("Deployment"), of_kind("ScaledObject", CASES["keda"])
    deployment["spec"]["template"]["spec"]["hostNetworks"] = True
    scaled["spec"]["minReplicas"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="hostNetworks"):
        kubernetes_validate.validate(deployment, "1.37", strict=True)
    with pytest.raises(jsonschema_rs.ValidationError, match="minReplicas"):
        jsonschema_rs.validate(json.loads(crd_schema("ScaledObject").read_text()), scaled)


def test_plain_manifests_and_table_are_current() -> None:
    assert chart.MANIFESTS.read_text() == chart.plain_manifests(), "run `make manifests`"
    assert chart.README.read_text() == chart.readme(), "run `make manifests`"


def test_every_value_is_documented() -> None:
    documented = {value.path for value in chart.values()}
    defaults = yaml.safe_load((chart.CHART / "values.yaml").read_text())

    def is_covered(path: str, value: Any) -> bool:
        inner = value.items() if isinstance(value, dict) else ()
        return path in documented or (
            bool(inner) and all(is_covered(f"{path}.{key}", each) for key, each in inner)
        )

    assert [key for key, value in defaults.items() if not is_covered(key, value)] == []


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({"replica": 2}, "replica"),
        ({"image": {"digest": "latest"}}, "digest"),
        ({"autoscaling": {"by": "cpu"}}, "by"),
        ({"networkPolicy": {"from": []}}, "from"),
        ({"policies": {"file": "a", "secret": "b"}}, "one of file, configMap and secret"),
    ],
)
def test_wrong_value_is_refused(values: dict[str, Any], wrong: str) -> None:
    with pytest.raises(helm_python.HelmError, match=wrong):
        chart.render(values)


def test_version_is_the_projects() -> None:
    project = tomllib.loads((chart.ROOT / "pyproject.toml").read_text())["project"]
    about = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())
    assert (about["version"], about["appVersion"]) == (project["version"],) * 2


def test_probes_ask_open_routes_on_the_images_port() -> None:
    server = container()
    (port,) = [one["containerPort"] for one in server["ports"] if one["name"] == "http"]
    assert f"\nEXPOSE {port}\n" in DOCKERFILE
    open_paths = {one.path for one in ROUTES if one.access is Access.OPEN and one.method == "GET"}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asks = server[probe]["httpGet"]
        assert asks["port"] == "http"
        assert asks["path"] in open_paths


def test_pod_drains_before_it_is_killed() -> None:
    shutdown = {"preStopSeconds": 7, "drainSeconds": 100}
    server = container({"shutdown": shutdown})
    assert "--shutdown-timeout=100" in server["args"]
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "7"]
    assert pod({"shutdown": shutdown})["terminationGracePeriodSeconds"] > 107
    assert pod()["terminationGracePeriodSeconds"] == 60


def test_pod_has_no_rights_and_writes_to_its_own_volumes_only() -> None:
    spec, server = pod(EVERYTHING), container(EVERYTHING)
    user = int(re.findall(r"^USER (\d+):", DOCKERFILE, re.MULTILINE)[0])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == user
    assert spec["automountServiceAccountToken"] is False
    rights = server["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    writable = {one["mountPath"] for one in server["volumeMounts"] if not one.get("readOnly")}
    assert writable == {"/cache", "/tmp", "/dev/shm", "/more"}


def test_variables_mean_something_to_the_server() -> None:
    ours = [name for name in variables(EVERYTHING) if name.startswith(PREFIX)]
    assert "RHEOSTAT_POLICY_FILE" in ours
    assert {name.removeprefix(PREFIX).lower() for name in ours} <= Settings.model_fields.keys()
    # Kubernetes would add RHEOSTAT_PORT and more, for a Service of that name.
    assert pod()["enableServiceLinks"] is False


@pytest.mark.parametrize(
    ("policies", "source"),
    [
        ({"file": POLICIES}, {"configMap": {"name": "rheostat-policies"}}),
        ({"configMap": "ours"}, {"configMap": {"name": "ours"}}),
        ({"secret": "ours"}, {"secret": {"secretName": "ours"}}),
    ],
)
def test_policies_are_a_folder_that_the_kubelet_keeps_current(
    policies: dict[str, str], source: dict[str, Any]
) -> None:
    values = {"policies": policies}
    (volume,) = [one for one in pod(values)["volumes"] if one["name"] == "policies"]
    (mount,) = [one for one in container(values)["volumeMounts"] if one["name"] == "policies"]
    assert volume == {"name": "policies", **source}
    assert mount == {"name": "policies", "mountPath": "/policies", "readOnly": True}
    assert variables(values)["RHEOSTAT_POLICY_FILE"] == "/policies/policies.yaml"


def test_monitoring_is_off_until_asked_for() -> None:
    kinds = {one["kind"] for one in chart.manifests()}
    assert not kinds & {"ServiceMonitor", "PrometheusRule", "ConfigMap"}


def test_metrics_are_scraped_at_the_images_second_port() -> None:
    (port,) = [one for one in container()["ports"] if one["name"] == "metrics"]
    assert f'"--metrics-port", "{port["containerPort"]}"' in DOCKERFILE
    (endpoint,) = of_kind("ServiceMonitor", EVERYTHING)["spec"]["endpoints"]
    ports = {one["name"]: one["targetPort"] for one in of_kind("Service")["spec"]["ports"]}
    assert ports[endpoint["port"]] == "metrics"
    reached = of_kind("NetworkPolicy")["spec"]["ingress"]
    assert [rule["ports"] for rule in reached] == [[{"port": "http"}], [{"port": "metrics"}]]


def test_rules_and_dashboard_are_those_of_the_folders() -> None:
    folder = chart.ROOT / "docker"
    texts = [(folder / "prometheus" / f"{name}.yaml").read_text() for name in FILES_OF_RULES]
    groups = [group for text in texts for group in yaml.safe_load(text)["groups"]]
    assert of_kind("PrometheusRule", EVERYTHING)["spec"]["groups"] == groups
    values = {"metrics": {"dashboard": {"enabled": True}}}
    dashboard = of_kind("ConfigMap", values)
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    shipped = (folder / "grafana" / "dashboards" / "rheostat.json").read_text()
    assert dashboard["data"] == {"rheostat.json": shipped}


def test_policy_file_arrives_as_it_is_and_changes_no_pod() -> None:
    assert of_kind("ConfigMap", {"policies": {"file": POLICIES}})["data"] == {
        "policies.yaml": POLICIES
    }
    one, other = ({"policies": {"file": text}} for text in (POLICIES, "  version: 1"))
    assert of_kind("Deployment", one) == of_kind("Deployment", other)


def test_operators_key_comes_from_a_secret() -> None:
    (found,) = [
        one for one in container(EVERYTHING)["env"] if one["name"] == "RHEOSTAT_OPERATOR_KEY_HASH"
    ]
    assert found["valueFrom"] == {"secretKeyRef": {"name": "operator", "key": "hash"}}
    assert "RHEOSTAT_OPERATOR_KEY_HASH" not in variables()


@pytest.mark.parametrize("by", ["hpa", "keda"])
def test_pods_follow_the_requests_that_wait(by: str) -> None:
    values = {"autoscaling": {"enabled": True, "by": by, "maxReplicas": 9}}
    kind = {"hpa": "HorizontalPodAutoscaler", "keda": "ScaledObject"}[by]
    scaling = of_kind(kind, values)
    assert scaling["spec"]["scaleTargetRef"]["name"] == "rheostat"
    assert 9 in scaling["spec"].values()
    assert "vllm:num_requests_waiting" in json.dumps(scaling)
    assert "{{" not in json.dumps(scaling)
    assert "replicas" not in of_kind("Deployment", values)["spec"]


def test_service_and_bounds_select_the_pods() -> None:
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        of_kind("Service")["spec"]["selector"],
        of_kind("Deployment")["spec"]["selector"]["matchLabels"],
        of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of_kind("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)


def test_two_releases_share_no_name() -> None:
    first, second = (
        {(one["kind"], one["metadata"]["name"]) for one in chart.manifests(name=name)}
        for name in ("a", "b")
    )
    assert first.isdisjoint(second)


def test_notes_warn_of_a_release_without_policies() -> None:
    assert "every caller" in chart.render()["NOTES.txt"]
    assert "every caller" not in chart.render({"policies": {"secret": "ours"}})["NOTES.txt"]


def test_chart_packs(tmp_path: Path) -> None:
    archive = helm_python.package(chart.CHART, destination=tmp_path)
    with tarfile.open(archive) as packed:
        names = packed.getnames()
        assert {"rheostat/values.schema.json", "rheostat/files/dashboard.json"} <= {*names}
        assert all(packed.getmember(name).isfile() for name in names)


def test_values_of_the_operations_page_exist() -> None:
    page = (chart.ROOT / "docs" / "operations.md").read_text()
    (block,) = re.findall(r"```yaml\n(networkPolicy:.*?)```", page, re.DOTALL)
    assert of_kind("HTTPRoute", yaml.safe_load(block))["spec"]["hostnames"] == ["llm.example.com"]
    documented = {value.path for value in chart.values()}
    named = re.findall(r"--set(?:-json|-file)?\s+'?([\w.]+)=", page)
    assert len(named) > 5
    assert {name.partition(".labels.")[0] for name in named} <= documented | {
        "metrics.serviceMonitor",
        "metrics.rules",
    }


def test_install_command_of_the_operations_page_renders_what_kubernetes_takes() -> None:
    page = (chart.ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"^helm upgrade --install (.*?[^\\])\n", page, re.DOTALL | re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    values: dict[str, Any] = {}
    for flag, text in pairwise(words):
        if flag in READERS:
            merge(values, READERS[flag](text))
    assert {"image", "model", "operatorKeyHash", "policies", "resources"} == values.keys()
    for one in chart.manifests(values):
        kubernetes_validate.validate(one, "1.37", strict=True)
    (applied,) = re.findall(r"<<'END'\n(.*?)END\n", page, re.DOTALL)
    for one in yaml.safe_load_all(applied):
        kubernetes_validate.validate(one, "1.37", strict=True)


def from_file(text: str) -> dict[str, Any]:
    path, _, file = text.partition("=")
    return helm_python.parse_set_file(f"{path}={chart.ROOT / file}")


READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "--set": helm_python.parse_set_string,
    "--set-json": helm_python.parse_set_json,
    "--set-file": from_file,
}


def merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict):
            merge(values.setdefault(key, {}), value)
        else:
            values[key] = value
