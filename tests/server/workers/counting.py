"""What a process of its own does in test_shared.py."""

from contextlib import suppress
from pathlib import Path

from models.errors import TenantFullError
from server.policies.book import Caller
from server.telemetry.recorder import MarginRecorder
from server.telemetry.trace import DecisionTrace
from server.web.admission import Admission
from server.web.errors import failure
from server.workers.shared import HttpProcess

NAMES = ("safety", "humanizing")
ROUNDS = 300


def enter_for_ever(process: HttpProcess, tenants: list[str], most: int) -> None:
    """Admits as much as it may of each tenant, from several processes at once."""
    admission = Admission(10**6, 0, process.counts)
    for _ in range(2 * most):
        for name in tenants:
            with suppress(TenantFullError):
                admission.enter(Caller(name, (), most))


def come_and_go(process: HttpProcess, name: str) -> None:
    """Admits and releases, so that rows of tenants become free."""
    admission = Admission(10**6, 0, process.counts)
    for turn in range(ROUNDS):
        place = admission.enter(Caller(f"{name}{turn}", ()))
        place.widen(3)
        place.leave()


def write_trace(process: HttpProcess, path: Path, name: str) -> None:
    """Writes lines that are long beside the size at which files are renamed."""
    trace = DecisionTrace(path, NAMES, max_bytes=2000, files=999, lock=process.lock)
    for _ in range(ROUNDS):
        trace.denials.add(failure(400, "no"), "/v1/chat/completions", name, None)
        trace._write(trace.denials.take())


def record(process: HttpProcess, path: Path) -> None:
    """Records margins, and writes them now and then."""
    recorder = MarginRecorder(path, 1.0, NAMES, "a" * 64, lock=process.lock)
    for turn in range(ROUNDS):
        recorder.add("default", (0.0, 1.0))
        if turn % 10 == 0:
            recorder.flush()
    recorder.flush()
