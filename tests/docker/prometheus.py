"""Debian's Prometheus, with the configuration of docker/prometheus; only its target replaced."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.servers import free_port, http_client, until

FOLDER = Path(__file__).parents[2] / "docker" / "prometheus"
RULES = (FOLDER / "recording.yaml", FOLDER / "alerts.yaml")
MISSING = (
    "this test runs a real Prometheus, and there is none on PATH or in the virtual environment, "
    "where `make setup` unpacks it from Debian's packages: apt-get install prometheus"
)
DISCOVERY = "dns_sd_configs: [{names: [server-1, server-2], type: A, port: 9400}]"
# A comparison with a number ends an alert's expression.
COMPARED = re.compile(r"(?P<value>.*\S)\s*[<>]\s*[\d.]+\s*", re.DOTALL)


def binary(name: str) -> str:
    """Returns where `prometheus` or `promtool` is."""
    unpacked = Path(sys.prefix) / "prometheus" / "usr" / "bin"
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(unpacked)]))
    if found is None:
        pytest.fail(MISSING, pytrace=False)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    """Yields each rule's name and what it computes; of an alert, what it compares."""
    for file in RULES:
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                if "record" in rule:
                    yield rule["record"], rule["expr"]
                    continue
                compared = COMPARED.fullmatch(rule["expr"])
                assert compared is not None, f"{rule['alert']} compares nothing with a number"
                yield rule["alert"], compared["value"]


class Prometheus:
    """A running Prometheus.

    Attributes:
        http: A client of its API.
    """

    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def query(self, expression: str) -> list[Any]:
        """Returns the samples of an expression now; a failing one fails the test."""
        answer = self.http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        samples: list[Any] = answer["data"]["result"]
        return samples

    def rules(self) -> list[Any]:
        """Returns all rules with their health."""
        groups = self.http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Runs Prometheus, which scrapes and evaluates every second.

    Args:
        folder: Empty; for its configuration and data.
        target: The address that it scrapes.
    """
    text = (FOLDER / "prometheus.yaml").read_text()
    static = f"static_configs: [{{targets: ['{target}']}}]"
    for line, own in ((DISCOVERY, static), ("15s", "1s")):
        assert line in text
        text = text.replace(line, own)
    (folder / "prometheus.yaml").write_text(text)
    for rules in RULES:
        shutil.copy(rules, folder)
    port = free_port()
    command = [binary("prometheus"), f"--config.file={folder}/prometheus.yaml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    http = http_client(f"http://127.0.0.1:{port}")
    try:
        until(lambda: _is_ready(http))
        yield Prometheus(http)
    finally:
        http.close()
        process.terminate()
        process.wait(timeout=30)


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False
