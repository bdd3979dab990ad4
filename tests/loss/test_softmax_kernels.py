"""Runs tests/loss/interpreted_kernels.py; test_fused_on_gpu.py runs the kernels compiled."""

from pathlib import Path

from tests.interpreted import run_interpreted


def test_kernels_interpreted_on_a_cpu() -> None:
    assert "16 passed" in run_interpreted(Path(__file__).with_name("interpreted_kernels.py"))
