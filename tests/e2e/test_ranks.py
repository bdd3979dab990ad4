"""Several ranks and engines decide as one does, and an engine without steering is none of them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.manifest import Manifest
from tests.e2e.decided.asking import ROUNDING
from tests.e2e.servers import START_LIMIT_S, Post, Server, free_port, rheostat_server

pytestmark = pytest.mark.long

REQUESTS = 256
ENGINES = {"tensor": 1, "data": 2, "headless": 2}
RULES = ("greedy", "greedy", "paper")
# Two workers on one NUMA node, which vLLM would not bind to cores by itself.
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
STOCK = (
    "import sys\nfrom server.vllm_names import make_arg_parser, run_headless\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "args = make_arg_parser(FlexibleArgumentParser()).parse_args(sys.argv[1:])\n"
    "args.api_server_count = 0\nrun_headless(args)\n"
)


def two_engines(port: int, *, local: int) -> list[str]:
    sizes = ["--data-parallel-size", "2", "--data-parallel-size-local", str(local)]
    return [*sizes, "--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(port)]


def other_engine(port: int) -> list[str]:
    return ["--headless", *two_engines(port, local=1), "--data-parallel-start-rank", "1"]


@pytest.fixture(scope="module", params=list(ENGINES))
def ranks(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    flags = {
        "tensor": ["--tensor-parallel-size", "2"],
        "data": ["--data-parallel-size", "2"],
        "headless": two_engines(port, local=1),
    }[request.param]
    with ExitStack() as ends:
        served = rheostat_server(checkpoint, folder / "log", *flags, variables=UNBOUND)
        ends.callback(served.end)
        if request.param == "headless":
            other = rheostat_server(
                checkpoint, folder / "other", *other_engine(port), variables=UNBOUND
            )
            ends.callback(other.end)
        yield served.wait_until_ready()


def posts(evaluation: list[dict[str, Any]], manifest: Manifest) -> list[Post]:
    """Returns requests with different prompts, dials, rules and routes; all have reports."""
    names, sensitivities = manifest.names, (0.02, 0.2, 0.5, 0.8, 0.98)
    requests = []
    for index in range(REQUESTS):
        row = evaluation[index % len(evaluation)]
        dials = {
            name: sensitivities[(index + place * (1 + index // 7)) % len(sensitivities)]
            for place, name in enumerate(names)
        }
        refusal = {"report": True, "decision": RULES[index % 3], "categories": dials}
        body = {"model": "demo", "max_tokens": 2, "temperature": 0, "refusal": refusal}
        messages = [{"role": "user", "content": row["prompt"]}]
        requests.append(Post("/v1/chat/completions", {**body, "messages": messages}))
    return requests


def choice_of(answer: httpx.Response) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_ranks_decide_as_one(
    server: Server, ranks: Server, evaluation: list[dict[str, Any]], manifest: Manifest
) -> None:
    sent = posts(evaluation, manifest)
    outcomes = [[choice_of(answer) for answer in one.post_all(sent)] for one in (server, ranks)]
    refused = 0
    for alone, together in zip(*outcomes, strict=True):
        mine, theirs = alone["refusal_report"], together["refusal_report"]
        refused += mine["refused"]
        sides = []
        for name, said in mine["decisions"].items():
            other = theirs["decisions"][name]
            assert other["margin"] == pytest.approx(said["margin"], abs=ROUNDING)
            assert other["bias"] == said["bias"]
            sides.append(abs(said["margin"] + said["bias"]))
        if min(sides) > ROUNDING:
            assert (theirs["refused"], theirs["category"]) == (mine["refused"], mine["category"])
            assert (together["message"].get("refusal") is not None) == mine["refused"]
    assert 0 < refused < REQUESTS


def test_every_engine_answered(request: pytest.FixtureRequest, ranks: Server) -> None:
    line = "vllm:request_success_total{"
    lines = [one for one in ranks.metrics().splitlines() if one.startswith(line)]
    engines = {one.split('engine="')[1][0] for one in lines}
    assert len(engines) == ENGINES[request.node.callspec.params["ranks"]]
    for engine in engines:
        of_engine = [one for one in lines if f'engine="{engine}"' in one]
        assert sum(float(one.rsplit(" ", 1)[1]) for one in of_engine) >= REQUESTS / 8


def test_server_does_not_start_with_an_engine_that_does_not_steer(
    checkpoint: Path, tmp_path: Path
) -> None:
    port = free_port()
    stock = ["--model", str(checkpoint), "--enforce-eager", "--dtype", "float32"]
    stock += ["--max-model-len", "512", "--no-enable-chunked-prefill", *other_engine(port)]
    with ExitStack() as ends:
        flags = two_engines(port, local=1)
        served = rheostat_server(checkpoint, tmp_path / "log", *flags, variables=UNBOUND)
        ends.callback(served.end)
        with (tmp_path / "other").open("wb") as log:
            other = subprocess.Popen(
                [sys.executable, "-c", STOCK, *stock],
                env={**os.environ, **UNBOUND, "VLLM_CPU_KVCACHE_SPACE": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        ends.callback(other.wait)
        ends.callback(other.terminate)
        assert served.process.wait(START_LIMIT_S) == 1
    said = [line for line in (tmp_path / "log").read_text().splitlines() if line[:9] == "rheostat:"]
    assert len(said) == 1
    assert said[0].startswith("rheostat: an engine does not say which steering it runs")
