"""The costs of the parts: what is measured is what decides, and the tables hold it."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.costs.__main__ import as_json, tables
from benchmarks.costs.functions import measure_functions
from benchmarks.costs.processors import VOCABULARY, Batch, Case, cpu_microseconds
from benchmarks.costs.quiet_steps import Quiet, quiet_steps
from tests.toy import save_toy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("toy")
    save_toy(folder)
    return folder


@pytest.mark.parametrize("runner", [1, 2])
@pytest.mark.parametrize("deciding", [0, 1, 3])
def test_measured_step_decides_as_many_rows_as_it_says(
    checkpoint: Path, runner: int, deciding: int
) -> None:
    batch = Batch(checkpoint, Case(runner, 3, deciding))
    for _ in range(2):  # a step is repeated while it is measured
        logits = torch.randn(3, VOCABULARY)
        batch.prepare()
        open_tokens = (batch.step(logits) > -math.inf).sum(dim=1)
        assert [int(count) == 1 for count in open_tokens] == [row < deciding for row in range(3)]


@pytest.mark.parametrize("runner", [1, 2])
def test_step_in_which_nobody_decides_allocates_no_tensor(checkpoint: Path, runner: int) -> None:
    quiet = quiet_steps(checkpoint, Case(runner, 3, 0))
    assert quiet.tensor_bytes == 0
    assert quiet.waits is None
    assert "aten::empty" not in quiet.operators
    assert quiet_steps(checkpoint, Case(runner, 3, 3)).tensor_bytes > 0


def test_tables_of_all_parts(checkpoint: Path) -> None:
    case = Case(1, 2, 0)
    found = {
        "http": {"plain": {"stock": [500.0, 500.0], "dials": [400.0, 400.0]}},
        "processors": {case: cpu_microseconds(checkpoint, case, 1)},
        "profile": {case: Quiet(100, 7, None, ["aten::index_fill_"])},
        "functions": measure_functions(checkpoint, 3),
    }
    text = tables(found)
    assert "| plain | dials | 400 | 0.800 (0.800 to 0.800) | +500 |" in text
    assert "| V1 | 0 of 2 | 2 | 7 | no device | index_fill_ |" in text
    assert "| a tenant by key, of 10,000 |" in text
    written = as_json(found)
    assert written["processors"][0]["rows"] == 2
    assert written["profile"][0]["operators"] == ["aten::index_fill_"]
