import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from models.errors import EvaluationError
from training.serving import free_port, serving, without_calibrations

ROOT = Path(__file__).parents[2]


def test_server_that_does_not_start_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with (
        pytest.raises(EvaluationError, match=r"did not start: rheostat: .*rheostat\.json does not"),
        serving(tmp_path, "m", log),
    ):
        pass
    assert log.read_text()


def test_free_port_is_one() -> None:
    assert 1024 <= free_port() < 65536


def test_links_lead_to_everything_but_the_calibrations(tmp_path: Path) -> None:
    (tmp_path / "calibrations").mkdir()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "config.json").write_text("{}")

    with without_calibrations(tmp_path) as folder:
        assert {entry.name for entry in folder.iterdir()} == {
            "config.json",
            "additional_chat_templates",
        }
        assert (folder / "config.json").read_text() == "{}"
    assert not folder.exists()
    assert (tmp_path / "config.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's doing")
def test_server_ends_with_a_killed_parent(tmp_path: Path) -> None:
    # The parent starts a server and is killed while it waits for it.
    program = (
        "import sys; from pathlib import Path; from training.serving import serving\n"
        "with serving(Path(sys.argv[1]), 'm', Path(sys.argv[1]) / 'log'): pass\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        children = psutil.Process(parent.pid).children()
        time.sleep(0.01)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    gone, left = psutil.wait_procs(children, timeout=20)
    assert gone
    assert left == []
