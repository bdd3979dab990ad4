"""Starting `rheostat serve` as a process of one's own, and ending it again."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from models.calibration import CALIBRATIONS
from models.errors import EvaluationError

HOST = "127.0.0.1"
START_LIMIT_S = 300
STOP_LIMIT_S = 30
POLL_S = 0.25
PR_SET_PDEATHSIG = 1


def exit_on_sigterm() -> None:
    """Has SIGTERM end this process as an error does, so that what it started is ended too."""
    signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, _frame: object) -> None:
    sys.exit(128 + number)


def free_port() -> int:
    """Returns a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    checkpoint: Path,
    name: str,
    log: Path,
    flags: Sequence[str] = (),
    port: int | None = None,
    *,
    inherit_settings: bool = True,
) -> Iterator[str]:
    """Serves a checkpoint on loopback for as long as the block runs.

    Args:
        flags: Further flags of `rheostat serve`, vLLM's among them.
        port: Where it listens; None for a free one.
        inherit_settings: Whether the RHEOSTAT_* variables of this process hold for it.

    Yields:
        The server's address, when it is ready.

    Raises:
        EvaluationError: The server ended or was not ready within `START_LIMIT_S`; the message
            holds the last line of its log.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "rheostat", "serve", "--model", str(checkpoint)]
    command += ["--served-model-name", name, "--host", HOST, "--port", str(port), *flags]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    if not inherit_settings:
        environment = {k: v for k, v in environment.items() if not k.startswith("RHEOSTAT_")}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=_ended_with_us(),
        )
    try:
        url = f"http://{HOST}:{port}"
        _wait_until_ready(url, process, log)
        yield url
    finally:
        end(process)


@contextmanager
def without_calibrations(checkpoint: Path) -> Iterator[Path]:
    """Yields a folder of links to a checkpoint's files, its calibrations left out.

    A calibration of earlier weights, which is about to be replaced, keeps a server from starting.
    """
    with TemporaryDirectory(prefix="rheostat-") as folder:
        for entry in checkpoint.resolve().iterdir():
            if entry.name != CALIBRATIONS:
                (Path(folder) / entry.name).symlink_to(entry)
        yield Path(folder)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Asks a server to stop, and kills it when it has not within `STOP_LIMIT_S`."""
    process.terminate()
    try:
        process.wait(timeout=STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _ended_with_us() -> Callable[[], None] | None:
    """Returns what makes Linux end the new process when this one dies, even of SIGKILL."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # loaded here: little may happen between fork and exec
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(POLL_S)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    raise EvaluationError(f"the server did not start: {last} (all of it: {log})")
