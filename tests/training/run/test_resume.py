import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import load_checkpoint
from tests.training.conftest import WriteRows, small_rows
from tests.training.killing import run
from tests.training.recipes import log_of, losses_of, tiny_config, weights_of
from training.config.recipe import TrainConfig
from training.run.folder import Identity, open_partial
from training.run.train import train


@pytest.fixture
def config(write_rows: WriteRows) -> TrainConfig:
    rows = write_rows(small_rows())
    return tiny_config(
        rows,
        optimisation={"epochs": 1.5, "save_every": 0.2},
        evaluation={"data": [str(rows)], "every": 0.3},
    )


def _values(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json")


def test_run_killed_at_many_moments_ends_with_the_same_losses_and_weights(
    config: TrainConfig, tmp_path: Path
) -> None:
    code, touched = run(_values(config), tmp_path / "whole")
    assert code == 0
    kills = 0
    out = tmp_path / "out"
    # Each process dies while it touches a file, and the next one goes on from where it came to.
    for kill_at in (touched // 8, *[touched // 2] * 20):
        code, _ = run(_values(config), out, kill_at)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not out.exists()
        kills += 1

    assert kills >= 2
    assert losses_of(out) == losses_of(tmp_path / "whole")
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(out)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert _measurements(out) == _measurements(tmp_path / "whole")
    load_checkpoint(out)
    assert not list(out.glob("resume*"))
    assert not list(out.glob("run.json*"))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"whole", "out"}


def _measurements(folder: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(folder) if "eval_auc" in line or "final" in line]


def test_dropout_is_drawn_alike_after_a_kill(config: TrainConfig, tmp_path: Path) -> None:
    base = train(config, tmp_path / "base")
    adapted = TrainConfig.model_validate(
        _values(config)
        | {"model": {"checkpoint": str(base)}, "lora": {"r": 4, "alpha": 8, "dropout": 0.3}}
    )
    code, touched = run(_values(adapted), tmp_path / "whole")
    assert code == 0

    code, _ = run(_values(adapted), tmp_path / "out", touched * 6 // 10)
    assert code == -signal.SIGKILL
    assert list((tmp_path / "out.partial" / "resume").glob("checkpoint-*"))
    code, _ = run(_values(adapted), tmp_path / "out")

    assert code == 0
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "whole")
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_another_recipe_left_is_discarded_with_a_line(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_partial(tmp_path / "out.partial", Identity("c" * 64, {"rows.jsonl": "d" * 64}, 1))
    left = tmp_path / "out.partial" / "resume" / "checkpoint-9"
    left.mkdir(parents=True)

    out = train(config, tmp_path / "out")

    told = " ".join(capsys.readouterr().err.split())
    assert "out.partial: an interrupted run of another recipe" in told
    assert "is discarded" in told
    load_checkpoint(out)
