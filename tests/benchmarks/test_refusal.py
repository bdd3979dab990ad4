"""What the refusal experiment measures and tells: one small training, the arithmetic by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.refusal.__main__ import (
    CROSS_ENTROPY,
    FLEXIBLE,
    GRID,
    Result,
    Runs,
    Setting,
    as_markdown,
    as_record,
    measured,
    summary,
    tuned,
)
from benchmarks.refusal.training import METRICS, PARTS, Search, Setup, Training, recipe, train_once
from tests.training.conftest import small_rows

RECIPE = Path("benchmarks/refusal/refusal.yaml")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in small_rows())
    for name in PARTS.values():
        (tmp_path / name).write_text(lines)
    return tmp_path


def test_training_is_measured_on_the_way_and_at_the_end(folder: Path) -> None:
    asked = Training(0.3, 1.0, 1e-3, 5, "report")

    setup = Setup(RECIPE, folder, epochs=3)

    found = train_once(asked, setup)

    assert [entry["step"] for entry in found["history"]] == [0, 1, 2, 3]
    assert set(found["final"]) == set(METRICS)
    # 32 rows are fewer than the sample on the way: both are measured on the same.
    last = {name: found["history"][-1][name] for name in METRICS}
    assert last == pytest.approx(found["final"])
    assert found == train_once(asked, setup)


def test_a_recipe_gets_loss_rate_seed_and_folder(tmp_path: Path) -> None:
    setup = Setup(Path("benchmarks/refusal/prompts.yaml"), tmp_path, None)

    made = recipe(setup, 2e-3, 7, -0.3, 0.0)

    assert made["seed"] == 7
    assert made["loss"]["decision"] == {"weight": 20, "q": -0.3, "gamma": 0.0}
    assert made["optimisation"]["learning_rate"] == 2e-3
    schedule = {"start": -1.0, "end": 0.0, "over": 0.5}
    assert recipe(setup, 2e-3, 7, json.dumps(schedule), 0.0)["loss"]["decision"]["q"] == schedule
    paths = [source["path"] for source in made["data"]["train"]]
    assert paths == [str(tmp_path / "train.jsonl")] * 2


def _result(loss: str, seed: int, areas: list[float], q: float | str = 0.0) -> Result:
    final = dict.fromkeys(METRICS, 0.5) | {"auc": areas[-1]}
    history = [{"step": 10 * at, "auc": area} for at, area in enumerate(areas)]
    return Result(loss, Training(q, 0.0, 1e-3, seed, "report"), history, final)


def test_summary_by_hand() -> None:
    settings = {
        CROSS_ENTROPY: Setting(0.0, 0.0, 1e-3),
        FLEXIBLE: Setting(None, None, 1e-3),
        "MAE": Setting(1.0, 0.0, 1e-3),
    }
    results = [
        _result(CROSS_ENTROPY, 0, [0.5, 0.6, 0.8]),
        _result(CROSS_ENTROPY, 1, [0.5, 0.7, 0.8]),
        _result(FLEXIBLE, 0, [0.5, 0.9, 0.9], q='{"start": -1.0, "end": 0.0, "over": 0.5}'),
        _result(FLEXIBLE, 1, [0.5, 0.9, 0.9]),
        _result("MAE", 0, [0.5, 0.6, 0.7]),
        _result("MAE", 1, [0.5, 0.6, 0.7]),
    ]

    plain, flexible, mae = summary(settings, results)

    assert plain.pace.ratio == 1
    assert plain.gain["auc"].mean == 0
    # Cross-entropy's best, .8, is reached at three quarters of 10 steps of 20.
    assert flexible.pace.ratio == pytest.approx(0.375, abs=0.01)
    assert flexible.gain["auc"] == pytest.approx((0.1, 0.0))
    assert flexible.members == {"(-1 to 0 over 0.5, 0)": 1, "(0, 0)": 1}
    text = as_markdown([plain, flexible, mae])
    assert "| flexible, auto | 0.001 | 2 | 0.900 ± 0.000 |" in text
    assert "| MAE | -0.100 ± 0.000 |" in text
    assert "never (never to never)" in text
    json.dumps([as_record(row) for row in (plain, flexible, mae)], allow_nan=False)


def test_loss_with_less_than_two_seeds_has_no_row() -> None:
    settings = {CROSS_ENTROPY: Setting(0.0, 0.0, 1e-3), "MAE": Setting(1.0, 0.0, 1e-3)}
    results = [_result(CROSS_ENTROPY, seed, [0.5, 0.8]) for seed in (0, 1)]
    results.append(_result("MAE", 0, [0.5, 0.8]))

    assert [row.loss for row in summary(settings, results)] == [CROSS_ENTROPY]


def _keep(path: Path, setup: Setup, asked: Training | Search, result: dict[str, Any]) -> None:
    line = {"asked": asked._asdict(), "setup": setup.key(), "result": result}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_what_is_on_disk_is_not_done_again(tmp_path: Path) -> None:
    # No data: whatever had to be trained would fail.
    for name in PARTS.values():
        (tmp_path / name).write_text("")
    setup = Setup(RECIPE, tmp_path, None)
    path = tmp_path / "results.jsonl"
    path.write_text('{"asked": {}, "epochs": 1.0, "result": {}}\n')  # of an earlier version
    for number, setting in enumerate(GRID["MAE"]):
        area = {1e-3: 0.9}.get(setting.learning_rate, 0.5 + number / 100)
        training = Training(1.0, 0.0, setting.learning_rate, 1000, "tune")
        _keep(path, setup, training, {"history": [], "final": {"auc": area}})
    chosen = {FLEXIBLE: Setting(None, None, 1e-3)}
    for seed, q in enumerate((-0.3, 0.0)):
        _keep(path, setup, Search(1e-3, seed), {"q": q, "gamma": 0.0})
        final = {"auc": 0.6 + seed / 10}
        _keep(path, setup, Training(q, 0.0, 1e-3, seed, "report"), {"history": [], "final": final})
    before = path.read_bytes()

    with Runs(setup, tmp_path, jobs=1) as runs:
        assert tuned(runs, ["MAE"]) == {"MAE": Setting(1.0, 0.0, 1e-3)}
        found = measured(runs, chosen, 2)

    assert [result.training.q for result in found] == [-0.3, 0.0]
    assert [result.final["auc"] for result in found] == pytest.approx([0.6, 0.7])
    assert path.read_bytes() == before


def test_other_data_are_another_experiment(folder: Path) -> None:
    before = Setup(RECIPE, folder, None).key()
    assert before == Setup(RECIPE, folder, None).key()
    assert before != Setup(RECIPE, folder, 2.0).key()

    (folder / PARTS["report"]).write_text("")

    assert before != Setup(RECIPE, folder, None).key()
