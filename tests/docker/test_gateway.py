"""docker/nginx.conf in a real nginx, before a small upstream; only the two addresses replaced."""

import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.server.failing import answers, expected, failing_app
from tests.server.wires import listening

CONF = Path(__file__).parents[2] / "docker" / "nginx.conf"
TIMEOUT_S = 10
REQUESTS = 2002
MISSING = (
    "this test runs a real nginx, and there is none on PATH, in /usr/sbin or in the virtual "
    "environment, where `make setup` unpacks it from Debian's packages: apt-get install nginx"
)


class Upstream(ThreadingHTTPServer):
    """Answers as the server would; a stream's second event waits for ``second_event``."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.second_event = threading.Event()
        self.seen: list[tuple[str, str]] = []
        self.headers: Message | None = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        self._note()
        self._answer(503 if self.path == "/readyz" else 200, b'{"from":"upstream"}')

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self._note()
        if self.path != "/v1/chat/completions":
            self._answer(200, str(len(body)).encode())
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._chunk(b"data: first\n\n")
        self.server.second_event.wait(TIMEOUT_S)
        self._chunk(b"data: second\n\n")
        self._chunk(b"")

    def log_message(self, *_: object) -> None:
        pass

    def _note(self) -> None:
        self.server.seen.append((self.command, self.path))
        self.server.headers = self.headers

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


class Gateway(NamedTuple):
    port: int
    upstream: Upstream

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        connection.request(method, path, body, headers or {})
        return connection.getresponse()


def nginx_binary() -> str:
    unpacked = Path(sys.prefix) / "nginx" / "usr" / "sbin"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", str(unpacked)])
    found = shutil.which("nginx", path=path)
    if found is None:
        pytest.fail(MISSING, pytrace=False)
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def adapt(listen: str, server: str) -> str:
    text = CONF.read_text()
    for line, own in (("listen 8080;", f"listen {listen};"), ("server server:8000;", server)):
        assert text.count(line) == 1
        text = text.replace(line, own)
    return text


def nginx_command(prefix: Path) -> list[str]:
    return [nginx_binary(), "-p", f"{prefix}/", "-c", f"{prefix}/nginx.conf", "-e", "stderr"]


@contextmanager
def nginx(prefix: Path, upstream_port: int) -> Iterator[int]:
    """Runs nginx before an upstream, and gives its port."""
    port = free_port()
    server = f"server 127.0.0.1:{upstream_port};"
    (prefix / "nginx.conf").write_text(adapt(f"127.0.0.1:{port}", server))
    # As root nginx would give its workers to a user that cannot enter the prefix.
    directives = "daemon off;" + (" user root;" if os.geteuid() == 0 else "")
    process = subprocess.Popen(
        [*nginx_command(prefix), "-g", directives],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_until_started(process)
        # Its log of errors must not fill the pipe.
        threading.Thread(target=list, args=(process.stderr,), daemon=True).start()
        yield port
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    upstream = Upstream()
    threading.Thread(target=upstream.serve_forever, daemon=True).start()
    with nginx(tmp_path_factory.mktemp("nginx"), upstream.server_address[1]) as port:
        yield Gateway(port, upstream)
    upstream.shutdown()
    upstream.server_close()


def wait_until_started(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "start worker process " in line:
            return
    pytest.fail(f"nginx did not start:\n{''.join(lines)}", pytrace=False)


def test_configuration_passes_nginx_own_check(tmp_path: Path) -> None:
    (tmp_path / "nginx.conf").write_text(adapt("8080", "server 127.0.0.1:8000;"))
    checked = subprocess.run(
        [*nginx_command(tmp_path), "-t"], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert checked.returncode == 0, checked.stderr
    assert "[warn]" not in checked.stderr


def test_plain_answer_and_status_come_through(gateway: Gateway) -> None:
    answer = gateway.send("GET", "/v1/models?a=b")
    assert (answer.status, answer.read()) == (200, b'{"from":"upstream"}')
    assert gateway.upstream.seen[-1] == ("GET", "/v1/models?a=b")
    assert gateway.send("GET", "/healthz").status == 200
    assert gateway.send("GET", "/readyz").status == 503


def test_streamed_event_comes_before_the_next_one_exists(gateway: Gateway) -> None:
    answer = gateway.send("POST", "/v1/chat/completions", b"{}")
    assert answer.read1() == b"data: first\n\n"
    gateway.upstream.second_event.set()
    assert answer.read() == b"data: second\n\n"


@pytest.mark.parametrize(
    "path",
    ["/metrics", "//metrics", "/v1/../metrics", "/metrics/", "/invocations", "/", "/docs"],
)
def test_paths_that_are_not_named_are_404(gateway: Gateway, path: str) -> None:
    gateway.upstream.seen.clear()
    answer = gateway.send("GET", path)
    assert answer.status == 404
    assert answer.getheader("content-type") == "application/json"
    assert b'"code":"not_found"' in answer.read()
    assert gateway.upstream.seen == []


def test_body_above_the_limit_is_413_and_never_reaches_the_server(gateway: Gateway) -> None:
    gateway.upstream.seen.clear()
    # The length alone decides: a body need not be sent.
    answer = gateway.send(
        "POST", "/v1/completions", headers={"Content-Length": str(32 * 2**20 + 1)}
    )
    assert answer.status == 413
    assert b'"code":"invalid_request"' in answer.read()
    assert gateway.upstream.seen == []


def test_body_at_the_limit_comes_through_whole(gateway: Gateway) -> None:
    answer = gateway.send("POST", "/v1/completions", bytes(4 * 2**20))
    assert (answer.status, answer.read()) == (200, b"4194304")


def test_refusal_headers_pass_and_forwarded_address_is_not_the_callers_word(
    gateway: Gateway,
) -> None:
    gateway.send(
        "GET", "/v1/models", headers={"X-Refusal": "safety=0.9", "X-Forwarded-For": "10.0.0.1"}
    )
    headers = gateway.upstream.headers
    assert headers is not None
    assert headers["x-refusal"] == "safety=0.9"
    assert headers.get_all("x-forwarded-for") == ["127.0.0.1"]


def test_server_that_is_gone_is_502_in_the_error_shape(gateway: Gateway, tmp_path: Path) -> None:
    with nginx(tmp_path, free_port()) as port:
        answer = Gateway(port, gateway.upstream).send("GET", "/v1/models")
        assert answer.status == 502
        assert b'"code":"service_error"' in answer.read()


def test_no_request_behind_an_error_of_the_server_is_lost(tmp_path: Path) -> None:
    with listening(failing_app()) as upstream, nginx(tmp_path, upstream) as port:
        assert answers(f"http://127.0.0.1:{port}", REQUESTS) == expected(REQUESTS)
