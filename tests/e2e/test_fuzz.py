"""Random requests to every route, made from the server's own OpenAPI document by schemathesis.

In `make test-long` they are the same ones every time; `make fuzz` sends new ones for `FUZZ_S`
seconds.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.dials.protocol import RefusalOptions
from server.web.access import ROUTES, Access
from tests.e2e.servers import OPERATOR, OPERATOR_KEY, Server, rheostat_server

ROOT = Path(__file__).parents[2]
FUZZ_S = int(os.environ.get("FUZZ_S", "0"))
# A short run leaves the systematic phase out, which alone takes minutes, and reaches every route.
SHORT = ["--phases", "fuzzing", "--max-examples", "40", "--seed", "1"]
LONG = ["--phases", "coverage,fuzzing", "--max-time", str(FUZZ_S)]
# Requests in flight get this long; a longer wait would be a hang.
ANSWER_LIMIT_S = 60
CHAT = "#/components/schemas/ChatCompletionRequest"


@pytest.fixture(scope="module")
def fuzzed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: what random requests leave behind is nobody else's."""
    log = tmp_path_factory.mktemp("fuzzed") / "log"
    with rheostat_server(checkpoint, log, "--enable-scale-out") as running:
        yield running


def document(server: Server) -> dict[str, Any]:
    """Returns the server's OpenAPI document with what it does not say.

    That is: the model's name, so that requests get further than it; the `refusal` object; and the
    body of `/invocations`.
    """
    told: dict[str, Any] = server.http.get("/openapi.json", headers=OPERATOR).json()
    for schema in told["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "model" in properties and ("messages" in properties or "prompt" in properties):
            properties["model"] = {"const": "demo"}
            properties["refusal"] = RefusalOptions.model_json_schema()
            schema["required"] = [*schema.get("required", []), "model"]
    for route in ROUTES:
        if route.access is Access.OFF:  # tests/e2e/test_access.py has these
            told["paths"].pop(route.path, None)
    told["paths"]["/invocations"]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": CHAT}}},
    }
    return told


@pytest.mark.long
@pytest.mark.timeout(FUZZ_S + 420)
def test_random_requests_are_answered_and_the_server_lives_on(
    fuzzed: Server, tmp_path: Path
) -> None:
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document(fuzzed)))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(path), "--url", fuzzed.url]
    command += ["--checks", "not_a_server_error,error_is_openais", "--continue-on-failure"]
    command += [*(LONG if FUZZ_S else SHORT), "--no-shrink"]
    command += ["--request-timeout", str(ANSWER_LIMIT_S), "--warnings", "off", "--no-color"]
    command += ["--header", f"Authorization: Bearer {OPERATOR_KEY}"]
    command += ["--report", "ndjson", "--report-dir", str(tmp_path)]
    command += ["--suppress-health-check", "all", "--generation-database", "none"]
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.e2e.fuzz_checks"}
    ended = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=FUZZ_S + 300,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
    assert fuzzed.process.poll() is None
    body = {"model": "demo", "prompt": "Hi", "max_tokens": 1}
    lives = fuzzed.http.post("/v1/completions", json=body)
    assert lives.status_code == 200, lives.text
