"""The servers that are measured, each started alone and stopped while another one is measured.

vLLM's engine and worker go on spinning for a second after their last request and would take the
cores from the next server.
"""

import shutil
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.serving.cells import FLOOR_BIAS, ServerName
from models.calibration import CALIBRATIONS, save_calibration
from models.manifest import load_manifest
from server.policies.credentials import generate_key, hash_key
from tests.e2e.policied import made_up_calibration
from tests.e2e.servers import Server

TENANT_KEY = generate_key()
CPU_FLAGS = ("--enforce-eager", "--dtype", "float32", "--max-model-len", "512")
STOCK = "vllm.entrypoints.launchers.api_server.entry"
# Stock answers after a control token where a request brings one.
CONTROL = "{%- if add_generation_prompt and control is defined -%}{{- control -}}{%- endif -%}"
# The library that follows grammars on this server.
GRAMMARS = ["--structured-outputs-config.backend", "guidance"]
GRAMMARS += ["--structured-outputs-config.disable_additional_properties", "true"]
POLICIES = f"""\
policies:
  open: {{}}
  floored:
    floors: {{CATEGORY: {{bias: {FLOOR_BIAS}}}}}
tenants:
  tenant:
    policies: [floored]
    keys: ["{hash_key(TENANT_KEY)}"]
anonymous: open
"""


@dataclass(frozen=True)
class Site:
    """What all servers of a run share.

    Attributes:
        folder: For logs, and for what is made for the servers.
        model: A copy of the checkpoint, with a calibration whose margins were never measured.
        flags: vLLM's, of every server.
        against: Another checkout of this project.
        together: Whether the servers start at once, which two cores are too few for.
    """

    folder: Path
    model: Path
    flags: tuple[str, ...]
    against: Path | None
    together: bool = False

    @classmethod
    def made(
        cls,
        checkpoint: Path,
        folder: Path,
        flags: tuple[str, ...] = CPU_FLAGS,
        against: Path | None = None,
        *,
        together: bool = False,
    ) -> "Site":
        """Copies the checkpoint and writes what the servers read."""
        model = folder / "model"
        shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns(CALIBRATIONS, "demo_data"))
        save_calibration(model, made_up_calibration(model, "default"))
        first = load_manifest(model).names[0]
        (folder / "policies.yaml").write_text(POLICIES.replace("CATEGORY", first))
        template = (model / "chat_template.jinja").read_text()
        (folder / "stock.jinja").write_text(template + CONTROL)
        return cls(folder, model, flags, against, together)

    def server(self, name: ServerName) -> Server:
        """Starts a server."""
        log = self.folder / f"{name.replace(' ', '_')}.log"
        common = ["--model", str(self.model), "--served-model-name", "demo"]
        if name in ("stock", "guard", "naive"):
            own = [*common, "--chat-template", str(self.folder / "stock.jinja"), *GRAMMARS]
            if name == "naive":
                own += ["--logits-processors", "benchmarks.serving.naive:NaiveBias"]
            return Server(STOCK, own, log, "/health", engine_flags=self.flags)
        module = "benchmarks.serving.small_pages" if name == "small pages" else "rheostat"
        return Server(
            module,
            ["serve", *common],
            log,
            "/readyz",
            {"RHEOSTAT_POLICY_FILE": str(self.folder / "policies.yaml")},
            self.against if name == "other" else None,
            self.flags,
        )


class Running(NamedTuple):
    """Servers that are ready and stopped.

    Attributes:
        ready_s: Seconds from each server's start until it answered.
    """

    servers: dict[ServerName, Server]
    ready_s: dict[ServerName, float]


@contextmanager
def started(site: Site, names: Sequence[ServerName]) -> Iterator[Running]:
    """Starts servers, one after the other or all at once; ends all of them."""
    groups = [names] if site.together else [[name] for name in names]
    with ExitStack() as stack:
        found = Running({}, {})
        for group in groups:
            start = time.perf_counter()
            servers = [stack.enter_context(ended(site.server(name))) for name in group]
            with ThreadPoolExecutor(len(group)) as threads:
                ready = list(threads.map(_ready_at, servers))
            for name, server, at in zip(group, servers, ready, strict=True):
                found.servers[name], found.ready_s[name] = server, at - start
                _signal(server, signal.SIGSTOP)
                stack.callback(_signal, server, signal.SIGCONT)  # a stopped one could not end
        yield found


@contextmanager
def ended(server: Server) -> Iterator[Server]:
    """Ends a server that is not waited for yet."""
    try:
        yield server
    finally:
        server.end()


def _ready_at(server: Server) -> float:
    server.wait_until_ready()
    return time.perf_counter()


@contextmanager
def resumed(servers: Iterable[Server]) -> Iterator[None]:
    """Lets stopped servers run."""
    running = list(servers)
    for server in running:
        _signal(server, signal.SIGCONT)
    try:
        yield
    finally:
        for server in running:
            _signal(server, signal.SIGSTOP)


def memory_mb(server: Server) -> float:
    """Returns the memory of a server's processes; what several share counts once."""
    infos = [process.memory_full_info() for process in _processes(server)]
    return sum(info.pss for info in infos) / 2**20


def http_cpu_s(server: Server) -> float:
    """Returns the CPU time of a server's first process, ended threads included."""
    # The clock of another process, as clock_getcpuclockid(3) names it: `cpu_times` counts in
    # hundredths of a second.
    return time.clock_gettime((~server.process.pid << 3) | 2)


def _processes(server: Server) -> list[psutil.Process]:
    process = psutil.Process(server.process.pid)
    return [process, *process.children(recursive=True)]


def _signal(server: Server, number: signal.Signals) -> None:
    for process in _processes(server):
        process.send_signal(number)
