"""vLLM's V2 model runner, which GPUs use, in the real engine: Triton interprets its kernels."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.gpu.correctness import Run, measure_correctness
from benchmarks.gpu.scenarios import Machine

pytestmark = pytest.mark.long


def test_v2_decides_and_writes_what_the_unmodified_engine_would(
    checkpoint: Path, tmp_path: Path
) -> None:
    run = Run(requests=40, prompts=10, tolerance=1e-3)
    machine = Machine("interpreted")
    found = measure_correctness(machine, checkpoint, run, tmp_path / "logs", Console(quiet=True))
    del found["unmodified engine"]
    assert len(found) == 3
    for name, counted in found.items():
        assert "failed" not in counted, (name, counted)
        answered = counted["answered"]
        assert answered + counted["cancelled"] == run.requests
        assert counted["v2"]
        assert counted["bounds_kept"]
        assert counted["decisions_equal"] + counted["near"] == answered, (name, counted)
        assert counted["texts_equal"] == answered, (name, counted)
        assert 0 < counted["refused"] < answered
        # One of the engine's is the successor of the stop tokens: margins took no second pass.
        assert counted["engine_requests"] <= answered + counted["cancelled"] + 1
    # Whether the tight cache preempts a request depends on when the requests arrive.
    assert found["n-gram drafts"]["accepted_drafts"] > 0
