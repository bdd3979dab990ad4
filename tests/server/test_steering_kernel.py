"""Runs tests/server/interpreted_steering.py; benchmarks.gpu runs the kernel compiled."""

from pathlib import Path

from tests.interpreted import run_interpreted


def test_kernel_interpreted_on_a_cpu() -> None:
    assert "9 passed" in run_interpreted(Path(__file__).with_name("interpreted_steering.py"))
