"""Running a file of tests of Triton kernels without a GPU."""

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(file: Path) -> str:
    """Runs tests where Triton interprets its kernels; returns pytest's output.

    Triton settles at its import whether it compiles or interprets, so this takes a process.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
