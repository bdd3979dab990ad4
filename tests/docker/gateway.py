"""docker/nginx.conf in a real nginx; only addresses, rates and tenants are replaced."""

import http.client
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

DOCKER = Path(__file__).parents[2] / "docker"
CONF = DOCKER / "nginx.conf"
TENANTS = DOCKER / "tenants.conf"
TIMEOUT_S = 10
UNLIMITED = "rate=100000r/s"
MISSING = (
    "this test runs a real nginx, and there is none on PATH, in /usr/sbin or in the virtual "
    "environment, where `make setup` unpacks it from Debian's packages: apt-get install nginx"
)


class Gateway(NamedTuple):
    """A running nginx.

    Attributes:
        port: Where it listens, with TLS.
        certificate: What proves that it is the gateway.
    """

    port: int
    certificate: Path

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    def tls(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))

    def connection(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "localhost", self.port, timeout=TIMEOUT_S, context=self.tls()
        )

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        connection = self.connection()
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


def site(port: int, upstreams: Sequence[int], rates: Sequence[str]) -> str:
    """Returns the configuration with a site's own lines.

    Args:
        port: Where it listens.
        upstreams: The servers' ports; one for each of the file.
        rates: Of a key, and of an address.
    """
    text = CONF.read_text()
    own = {
        "listen 8443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "listen 127.0.0.1:8080;": f"listen 127.0.0.1:{free_port()};",
        "rate=20r/s": rates[0],
        "rate=100r/s": rates[1],
        "server server-1:8000": f"server 127.0.0.1:{upstreams[0]}",
        "server server-2:8000": f"server 127.0.0.1:{upstreams[-1]}",
    }
    for line, mine in own.items():
        assert text.count(line) == 1
        text = text.replace(line, mine)
    return text


def write_site(
    prefix: Path,
    port: int,
    upstreams: Sequence[int],
    rates: Sequence[str] = (UNLIMITED, UNLIMITED),
    tenants: str | None = None,
) -> Path:
    """Writes all that nginx reads, and returns the certificate's path."""
    (prefix / "nginx.conf").write_text(site(port, upstreams, rates))
    (prefix / "tenants.conf").write_text(tenants or TENANTS.read_text())
    return make_certificate(prefix / "tls")


def make_certificate(folder: Path) -> Path:
    folder.mkdir()
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost -keyout tls.key -out tls.crt"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "tls.crt"


def nginx_command(prefix: Path) -> list[str]:
    return [nginx_binary(), "-p", f"{prefix}/", "-c", f"{prefix}/nginx.conf", "-e", "stderr"]


@contextmanager
def nginx(
    prefix: Path,
    upstreams: Sequence[int],
    rates: Sequence[str] = (UNLIMITED, UNLIMITED),
    tenants: str | None = None,
) -> Iterator[Gateway]:
    """Runs nginx before the servers.

    Args:
        prefix: A folder of its own.
        upstreams: The servers' ports.
        rates: Of a key, and of an address.
        tenants: In the place of docker/tenants.conf.
    """
    port = free_port()
    certificate = write_site(prefix, port, upstreams, rates, tenants)
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
        yield Gateway(port, certificate)
    finally:
        process.terminate()
        process.wait(timeout=TIMEOUT_S)


def wait_until_started(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if "start worker process " in line:
            return
    pytest.fail(f"nginx did not start:\n{''.join(lines)}", pytrace=False)
