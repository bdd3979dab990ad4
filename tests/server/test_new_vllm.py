"""The newest vLLM under the engine seam, without vLLM's binaries: the next move is noticed here.

Its wheel is downloaded once into the virtual environment, beside the installed packages, and a
process of its own imports it instead of the installed vLLM.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from server.web.access import ROUTES
from tests.docs.tables import field_rows, registered_fields, registered_routes
from tests.toy import save_toy

pytestmark = pytest.mark.long

NEWEST = "0.33.0"
# What it needs beyond the packages of the installed vLLM.
LACKING = ("orjson==3.13.0",)
ROOT = Path(__file__).parents[2]
# They need neither an engine nor vLLM's binaries.
SEAM = (
    *("tests/server/test_engine.py", "tests/server/test_steering.py"),
    *("tests/server/test_grammar_meter.py", "tests/server/workers", "tests/server/generation"),
    *("tests/server/apis/test_responses.py", "tests/server/web/test_guard_rendered.py"),
)


@pytest.fixture(scope="module")
def newest() -> Path:
    """The folder of the newest vLLM's Python files."""
    folder = Path(sys.prefix) / f"vllm-{NEWEST}"
    if not folder.is_dir():
        partial = folder.with_suffix(f".{os.getpid()}")
        _unpack(partial)
        partial.rename(folder)
    return folder


def _unpack(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = [
        "--no-cache-dir",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--platform",
        "manylinux_2_28_x86_64",
    ]
    download = [*pip, "download", *wheels, "--dest", str(folder / "wheel"), f"vllm=={NEWEST}"]
    subprocess.run(download, check=True)
    (wheel,) = (folder / "wheel").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(".so")]
        archive.extractall(folder, names)
    shutil.rmtree(folder / "wheel")
    # From its version it takes the platform, and PyPI's is the build for CUDA.
    metadata = folder / f"vllm-{NEWEST}.dist-info" / "METADATA"
    said = metadata.read_text()
    metadata.write_text(said.replace(f"\nVersion: {NEWEST}\n", f"\nVersion: {NEWEST}+cpu\n"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), *LACKING], check=True)


def run(newest: Path, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Runs a Python module that finds the newest vLLM before the installed one."""
    environment = {**os.environ, "PYTHONPATH": f"{newest}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_seam_passes_its_tests(newest: Path) -> None:
    done = run(newest, ["pytest", "-q", "-p", "no:cacheprovider", *SEAM])
    assert done.returncode == 0, done.stdout[-4000:]


def test_its_routes_and_fields_are_known(newest: Path, tmp_path: Path) -> None:
    save_toy(tmp_path)
    done = run(newest, ["tests.e2e.vllm_app", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-4000:]
    app = json.loads(done.stdout.splitlines()[-1])
    routes = {route for route in registered_routes(app) if route[0] != "MOUNT"}
    assert routes - {(route.method, route.path) for route in ROUTES} == set()
    page = {field: listed for field, (listed, _) in field_rows().items()}
    assert page == registered_fields(app["openapi"])
