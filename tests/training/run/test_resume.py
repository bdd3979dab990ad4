import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import load_checkpoint
from models.errors import ConfigError
from tests.training.conftest import WriteRows, small_rows
from tests.training.killing import run
from tests.training.recipes import log_of, losses_of, tiny_config, weights_of
from training.config.recipe import TrainConfig
from training.run.folder import Identity, locked, mark_finished, open_partial
from training.run.resume import ResumePoints
from training.run.train import train

IDENTITY = Identity("c" * 64, {"rows.jsonl": "d" * 64}, 1)


@pytest.fixture
def config(write_rows: WriteRows) -> TrainConfig:
    rows = write_rows(small_rows())
    return tiny_config(
        rows,
        optimisation={"epochs": 2.5, "save_every": 0.2},
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
    for kill_at in (touched // 8, *[touched * 2 // 5] * 20):
        code, _ = run(_values(config), out, kill_at)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not out.exists()
        kills += 1

    assert kills >= 3
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
    values = _values(config)
    code, touched = run(values, tmp_path / "out")
    assert code == 0
    run(values, tmp_path / "other", touched * 6 // 10)
    assert (tmp_path / "other.partial" / "resume").is_dir()

    train(config.model_copy(update={"seed": 5}), tmp_path / "other")

    told = " ".join(capsys.readouterr().err.split())
    assert "other.partial: an interrupted run of another recipe" in told
    assert "is discarded" in told
    manifest, _ = load_checkpoint(tmp_path / "other")
    assert manifest.recipe is not None
    assert manifest.recipe.seed == 5


def test_folder_that_no_run_left_is_not_touched(config: TrainConfig, tmp_path: Path) -> None:
    kept = tmp_path / "out.partial" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("mine")

    with pytest.raises(ConfigError, match="no training run left it"):
        train(config, tmp_path / "out")

    assert kept.read_text() == "mine"


def test_second_run_to_the_same_place_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        locked(out),
        pytest.raises(ConfigError, match=rf"another training run \(process {os.getpid()}\)"),
    ):
        train(config, out)

    with locked(out):
        pass
    assert not list(tmp_path.glob("*.lock"))


def test_lock_ends_with_a_killed_process(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from training.run.folder import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)\n"
    )
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=str(process.pid)), locked(out):
            pass
        process.kill()

    with locked(out):
        pass


def _write_point(points: ResumePoints, step: int, best_step: int | None) -> None:
    folder = points.scratch / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"best_global_step": best_step}))
    points.commit(step, best_step)


def _write_best(points: ResumePoints, step: int) -> None:
    written = points.scratch / "best"
    written.mkdir(parents=True)
    (written / "weights").write_text(str(step))
    points.commit_best(written, step)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "writing")


def test_only_the_two_newest_points_stay(tmp_path: Path) -> None:
    points = ResumePoints(tmp_path)
    for step in (9, 10, 110):
        _write_point(points, step, None)

    assert _names(tmp_path) == ["checkpoint-10", "checkpoint-110"]
    assert points.open() == tmp_path / "checkpoint-110"


def test_best_weights_stay_as_long_as_a_point_needs_them(tmp_path: Path) -> None:
    points = ResumePoints(tmp_path)
    _write_best(points, 5)
    _write_point(points, 10, 5)
    _write_best(points, 12)
    assert _names(tmp_path) == ["best-12", "best-5", "checkpoint-10"]

    # Killed here: what comes after the newest point is done again.
    assert points.open() == tmp_path / "checkpoint-10"
    assert _names(tmp_path) == ["best-5", "checkpoint-10"]

    _write_best(points, 12)
    _write_point(points, 20, 12)
    _write_point(points, 30, 12)
    assert _names(tmp_path) == ["best-12", "checkpoint-20", "checkpoint-30"]
    assert (points.best(12) / "weights").read_text() == "12"


def test_half_written_point_is_none(tmp_path: Path) -> None:
    points = ResumePoints(tmp_path)
    _write_point(points, 4, None)
    half = points.scratch / "checkpoint-8"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")

    assert points.open() == tmp_path / "checkpoint-4"
    assert not points.scratch.exists()


def test_partial_folder_knows_its_run_and_its_end(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    assert open_partial(partial, IDENTITY) == (None, False)
    (partial / "kept").touch()
    assert open_partial(partial, IDENTITY) == (None, False)
    mark_finished(partial, IDENTITY)
    assert open_partial(partial, IDENTITY) == (None, True)
    assert (partial / "kept").exists()

    opened = open_partial(partial, IDENTITY._replace(processes=2))

    assert opened.discarded is not None
    assert not opened.finished
    assert not (partial / "kept").exists()
