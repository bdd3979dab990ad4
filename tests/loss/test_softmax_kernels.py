"""Runs tests/loss/interpreted_kernels.py; test_fused_on_gpu.py runs the kernels compiled."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_interpreted_on_a_cpu() -> None:
    # Triton settles at its import whether it compiles or interprets.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(Path(__file__).with_name("interpreted_kernels.py")),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 passed" in done.stdout
