"""A server that ends takes its processes along. It ends the session's servers: conftest.py."""

import os
import signal

import psutil

from tests.e2e.calibrating import CalibratedServer
from tests.e2e.policied import Policied
from tests.e2e.servers import Server, until
from tests.server.wires import connect


def check_end(server: Server, ending: signal.Signals) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert any(child.is_running() for child in children)
    server.process.send_signal(ending)
    server.process.wait(timeout=30)
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert len(gone) == len(children)


def test_terminated_server_waits_for_no_client_and_no_policy_file(policied: Policied) -> None:
    server = policied.server
    with connect(server.port) as half_head, connect(server.port) as half_body:
        half_head.sendall(b"POST /v1/completions HTTP/1.1\r\n")
        half_body.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        policied.file.unlink()
        os.mkfifo(policied.file)
        until(lambda: server.metric("rheostat_policy_file_valid") == 0)
        check_end(server, signal.SIGTERM)


def test_killed_server_leaves_no_process(calibrated: CalibratedServer) -> None:
    check_end(calibrated.server, signal.SIGKILL)
