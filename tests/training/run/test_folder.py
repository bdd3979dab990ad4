import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import ConfigError
from tests.training.conftest import WriteRows, small_rows
from tests.training.recipes import tiny_config
from training.config.recipe import TrainConfig
from training.run.folder import Identity, locked, mark_finished, open_partial
from training.run.resume import ResumePoints
from training.run.train import train

IDENTITY = Identity("c" * 64, {"rows.jsonl": "d" * 64}, 1)


@pytest.fixture
def config(write_rows: WriteRows) -> TrainConfig:
    return tiny_config(write_rows(small_rows()))


def test_folder_that_is_no_checkpoint_is_never_replaced(
    config: TrainConfig, tmp_path: Path
) -> None:
    kept = tmp_path / "out" / "thesis.txt"
    kept.parent.mkdir()
    kept.write_text("mine")

    with pytest.raises(ConfigError, match="not a checkpoint"):
        train(config, tmp_path / "out", force=True)

    assert kept.read_text() == "mine"


@pytest.mark.parametrize("name", [".", "/", "n" * 241])
def test_folder_that_cannot_be_named_is_one_line(config: TrainConfig, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a folder"):
        train(config, Path(name))


def test_folder_below_a_file_is_one_line(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=r"file/out: cannot be written: .*--out"):
        train(config, tmp_path / "file" / "out")


def test_file_where_the_run_would_write_is_left_alone(config: TrainConfig, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.write_text("mine")

    with pytest.raises(ConfigError, match="no training run left it"):
        train(config, tmp_path / "out")
    assert partial.read_text() == "mine"


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
