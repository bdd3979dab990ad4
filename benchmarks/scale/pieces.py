"""The pieces: what a request takes of the processor, what a server shows, how policies come in."""

import json
import time
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from benchmarks.costs.functions import measure_functions
from benchmarks.scale.load import Load, chat, closed
from benchmarks.scale.replicas import processor_s, replicas
from benchmarks.serving.servers import TENANT_KEY, Site
from models.manifest import load_manifest
from server.dials.calibrations import load_calibrations
from server.policies.credentials import hash_key
from server.policies.loading import Served, load_policies
from tests.e2e.servers import Server, free_port

AT_ONCE = 32
TOKENS = (1, 16, 64)
TENANTS = (100, 1_000, 10_000)
Kind = Literal["plain", "streamed"]
KINDS: tuple[Kind, ...] = ("plain", "streamed")


def request(kind: Kind, tokens: int) -> bytes:
    """Returns a chat with dials of its own, of a tenant with floors."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": "How long do I have to cook potatoes?"}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": kind == "streamed",
        "refusal": {"categories": {"safety": {"bias": -9.5}}},
    }
    return chat(json.dumps(body).encode(), TENANT_KEY)


def measure_pieces(site: Site, requests: int) -> dict[str, Any]:
    """Returns all pieces, as JSON."""
    return {
        "categories": len(load_manifest(site.model).names),
        "instant": _instant(site, requests),
        "engine": _engine(site, requests),
        "policies": {str(count): _policies_s(site, count) for count in TENANTS},
        "functions": measure_functions(site.model, 200),
    }


def _instant(site: Site, requests: int) -> dict[Kind, float]:
    with replicas(site.model, site.folder / "policies.yaml", 1) as (replica,):
        return {
            kind: _http_s(Load(replica.port, [request(kind, 16)]), replica.processes, requests)
            for kind in KINDS
        }


def _engine(site: Site, requests: int) -> dict[str, Any]:
    metrics = free_port()
    variables = {
        "RHEOSTAT_POLICY_FILE": str(site.folder / "policies.yaml"),
        "RHEOSTAT_METRICS_PORT": str(metrics),
    }
    arguments = ["serve", "--model", str(site.model), "--served-model-name", "demo"]
    log = site.folder / "engine.log"
    with Server("rheostat", arguments, log, "/readyz", variables, None, site.flags) as server:
        process = [psutil.Process(server.process.pid)]
        found = {
            str(tokens): {
                kind: _http_s(
                    Load(server.port, [request(kind, tokens)]), process, max(AT_ONCE, requests // 8)
                )
                for kind in KINDS
            }
            for tokens in TOKENS
        }
        return {"http_s": found, "metrics": _metrics(metrics)}


def _http_s(load: Load, processes: list[psutil.Process], requests: int) -> float:
    """Returns the processor time that a request takes of HTTP processes."""
    closed(load, AT_ONCE, AT_ONCE)
    before_s = processor_s(processes)
    closed(load, AT_ONCE, requests)
    return (processor_s(processes) - before_s) / requests


def _metrics(port: int) -> dict[str, Any]:
    began_s = time.perf_counter()
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    took_s = time.perf_counter() - began_s
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    families = ("rheostat_", "vllm:", "http_")
    series = {name: sum(line.startswith(name) for line in lines) for name in families}
    others = len(lines) - sum(series.values())
    return {"series": {**series, "others": others}, "bytes": len(text), "seconds": took_s}


def _policies_s(site: Site, tenants: int) -> float:
    """Returns how long a file of so many tenants takes to be read and checked."""
    entries = "\n".join(
        f'  t{i}: {{policies: [open], keys: ["{hash_key(str(i))}"]}}' for i in range(tenants)
    )
    path: Path = site.folder / "many.yaml"
    path.write_text(f"policies:\n  open: {{}}\ntenants:\n{entries}\n")
    manifest = load_manifest(site.model)
    served = Served(manifest, load_calibrations(site.model, manifest))
    began_s = time.process_time()
    load_policies(path, served)
    return time.process_time() - began_s
