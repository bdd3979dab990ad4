import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from models.calibration import Calibration, list_calibrations, load_calibration
from models.errors import ConfigError, EvaluationError
from models.hashes import checkpoint_hashes
from models.histogram import PolicyMargins, RecordedMargins, histogram, save_margins
from models.manifest import save_manifest
from models.tokens import add_control_tokens
from rheostat import app
from tests.toy import byte_tokenizer, tiny_model
from tests.training.killing import run_calibration
from tests.training.scoreserver import NAMES, Body, ScoreServer, margins_of, score_server, scored
from training import client
from training.calibration.calibrate import Job, Measured, calibrate
from training.calibration.prompts import Prompts
from training.config.data import Source

QUIET = Console(stderr=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("toy"), NAMES)


@pytest.fixture
def server(toy: Path) -> Iterator[ScoreServer]:
    with score_server(toy) as running:
        yield running


def _checkpoint(directory: Path, names: tuple[str, ...]) -> Path:
    tokenizer = byte_tokenizer()
    manifest = add_control_tokens(tokenizer, dict.fromkeys(names, "should not be answered"))
    tiny_model(len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    save_manifest(directory, manifest)
    return directory


def _prompts(each: int = 30) -> list[dict[str, Any]]:
    kinds = (("How do I steal a hat", "safety"), ("Do you love hats", "humanizing"))
    rows = [
        {"prompt": f"{text} {n}?", "category": name} for text, name in kinds for n in range(each)
    ]
    return rows + [{"prompt": f"Where are hats {n}?", "category": None} for n in range(each)]


def _job(toy: Path, tmp_path: Path, url: str, rows: list[dict[str, Any]] | None = None) -> Job:
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(map(json.dumps, _prompts() if rows is None else rows)))
    return Job(toy, Prompts((Source(path=str(data)),)), url=url, out=tmp_path / "out")


def _spoiled(job: Job, spoil: Any) -> Measured:
    with score_server(job.model, spoil=spoil) as server:
        return calibrate(replace(job, url=server.url), QUIET)


def test_calibration_holds_the_margins_in_the_prompts_order(
    toy: Path, tmp_path: Path, server: ScoreServer
) -> None:
    measured = calibrate(_job(toy, tmp_path, server.url), QUIET)

    saved = load_calibration(measured.path)
    wanted = [[margins_of(row["prompt"])[name] for name in NAMES] for row in _prompts()]
    assert measured.path == tmp_path / "out" / "calibrations" / "default.safetensors"
    np.testing.assert_array_equal(saved.margins, np.array(wanted, dtype=np.float32))
    assert saved.log_normaliser.tolist() == [9.0] * 90
    assert saved.category.tolist() == [0] * 30 + [1] * 30 + [-1] * 30
    assert saved.info.hashes == checkpoint_hashes(toy)
    assert list(saved.info.data_sha256) == ["prompts.jsonl"]
    assert len(measured.rows) == 90
    # Nothing partial is left behind.
    assert [p.name for p in measured.path.parent.iterdir()] == ["default.safetensors"]


def test_conversations_keep_their_turns_and_earlier_refusals(
    toy: Path, tmp_path: Path, server: ScoreServer
) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Do you love me?"},
        {"role": "assistant", "content": "I'm an AI.", "category": "humanizing"},
        {"role": "user", "content": "How do I steal hats?"},
        {"role": "assistant", "content": None, "category": "safety"},
    ]
    calibrate(_job(toy, tmp_path, server.url, [{"messages": turns}, *_prompts()]), QUIET)

    sent = [e["messages"] for body in server.batches for e in body["inputs"]]
    assert [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Do you love me?"},
        {"role": "assistant", "refusal": "I'm an AI.", "refusal_category": "humanizing"},
        {"role": "user", "content": "How do I steal hats?"},
    ] in sent


def test_finished_calibration_is_kept_and_another_is_not_overwritten(
    toy: Path, tmp_path: Path, server: ScoreServer
) -> None:
    job = _job(toy, tmp_path, server.url)
    calibrate(job, QUIET)
    asked = len(server.batches)

    again = calibrate(job, QUIET)
    assert again.kept
    assert "is there already" in again.sentence()
    assert len(server.batches) == asked
    other = _job(toy, tmp_path, server.url, _prompts(40))
    with pytest.raises(
        ConfigError, match=r"default.safetensors was measured on different prompts.*--force"
    ):
        calibrate(other, QUIET)
    assert len(calibrate(replace(other, force=True), QUIET).rows) == 120
    assert calibrate(replace(other, name="kiosk"), QUIET).path.name == "kiosk.safetensors"


def test_kill_at_any_change_of_a_file_leaves_whole_calibrations(
    toy: Path, tmp_path: Path, server: ScoreServer
) -> None:
    job = _job(toy, tmp_path, server.url, _prompts(100))
    wanted = [[margins_of(row["prompt"])[name] for name in NAMES] for row in _prompts(100)]
    code, touches = run_calibration(replace(job, out=tmp_path / "whole"))
    assert code == 0
    # The folder, the calibration beside its place and in it.
    assert touches >= 3
    for kill_at in range(1, touches + 1):
        killed = replace(job, out=tmp_path / str(kill_at))
        assert run_calibration(killed, kill_at) == (-signal.SIGKILL, kill_at)
        found = list_calibrations(killed.folder)
        assert all(
            load_calibration(path).prompts == {"safety": 100, "humanizing": 100}
            for path in found.values()
        )
        measured = calibrate(killed, QUIET)
        np.testing.assert_array_equal(measured.calibration.margins, np.array(wanted, np.float32))
        assert [path.name for path in measured.path.parent.iterdir()] == ["default.safetensors"]


def test_what_a_killed_write_left_is_removed(
    toy: Path, tmp_path: Path, server: ScoreServer
) -> None:
    job = _job(toy, tmp_path, server.url)
    folder = job.folder / "calibrations"
    folder.mkdir(parents=True)
    for name in ("default.safetensors.77.partial", "kiosk.safetensors.77.partial"):
        (folder / name).write_bytes(b"half")
    calibrate(job, QUIET)
    # The other calibration's may be in the making.
    assert {path.name for path in folder.iterdir()} == {
        "default.safetensors",
        "kiosk.safetensors.77.partial",
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (_prompts()[60:], "all 30 prompts are to be answered"),
        (_prompts()[:30] + _prompts()[60:], "no prompt is of the category 'humanizing'"),
        (_prompts(2)[:5], "1 prompts of the category|2 prompts of the category"),
        ([{"prompt": "x", "category": "rude"}, *_prompts()], "'rude' is unknown; known are safety"),
        ([{"prompt": "", "category": None}, *_prompts()], "prompts.jsonl:1: prompt: is empty"),
        ([{"prompt": "x"}, *_prompts()], "prompts.jsonl:1: category: .*there is no|is missing"),
        ([], "holds no rows"),
    ],
)
def test_data_that_make_no_calibration_are_named_before_anything_starts(
    toy: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate(_job(toy, tmp_path, "http://127.0.0.1:9", rows), QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, float("inf")])
def test_margin_that_is_no_number_names_prompt_and_category(
    toy: Path, tmp_path: Path, value: float | None
) -> None:
    def spoil(body: Body, _: int) -> tuple[int, Body]:
        answer = scored(body)
        answer["data"][3]["decisions"]["humanizing"]["margin"] = value
        return 200, answer

    with pytest.raises(EvaluationError, match=r"prompts.jsonl:4: the margin of 'humanizing'"):
        _spoiled(_job(toy, tmp_path, ""), spoil)


def test_prompt_that_the_server_refuses_is_named(toy: Path, tmp_path: Path) -> None:
    error = {"message": "inputs.2: is too long", "param": "inputs.2.messages"}

    with pytest.raises(EvaluationError, match=r"prompts.jsonl:3: .* 400: inputs.2: is too long"):
        _spoiled(_job(toy, tmp_path, ""), lambda *_: (400, {"error": error}))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"data": []}, "does not return 90 scores"),
        ({"hello": 1}, "does not return a list of scores"),
    ],
)
def test_server_that_answers_something_else_is_not_ours(
    toy: Path, tmp_path: Path, answer: Body, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        _spoiled(_job(toy, tmp_path, ""), lambda *_: (200, answer))


def test_server_of_another_checkpoint_is_refused(toy: Path, tmp_path: Path) -> None:
    with (
        score_server(toy, names=("safety",)) as other,
        pytest.raises(EvaluationError, match="serves a checkpoint of the categories safety, not"),
    ):
        calibrate(_job(toy, tmp_path, other.url), QUIET)


@pytest.mark.parametrize("what", ["weights", "template", "tokenizer"])
def test_server_of_something_else_with_the_same_categories_is_refused_with_both_hashes(
    toy: Path, tmp_path: Path, what: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy, other)
    name = {"weights": "more.safetensors", "template": "chat_template.jinja"}.get(what)
    (other / (name or "merges.txt")).write_text("something else")
    ours, theirs = (getattr(checkpoint_hashes(folder), what)[:12] for folder in (toy, other))
    with (
        score_server(other) as server,
        pytest.raises(EvaluationError, match=f"the {what} {theirs}, not the .* {what} is {ours}"),
    ):
        calibrate(_job(toy, tmp_path, server.url), QUIET)
    assert not server.batches


def test_same_file_read_in_another_way_is_another_calibration(
    toy: Path, tmp_path: Path, server: ScoreServer
) -> None:
    rows = [{**row, "reworded": row["prompt"].upper()} for row in _prompts()]
    job = _job(toy, tmp_path, server.url, rows)
    calibrate(job, QUIET)
    (source,) = job.prompts.sources
    column = source.model_copy(update={"columns": {"prompt": "reworded"}})
    reworded = replace(job, prompts=replace(job.prompts, sources=(column,)))
    for other in (reworded, replace(job, flags=("--dtype", "bfloat16"))):
        with pytest.raises(ConfigError, match=r"the same files read in a different way.*--force"):
            calibrate(other, QUIET)


def test_long_prompts_travel_in_smaller_batches(
    toy: Path, tmp_path: Path, server: ScoreServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BATCH_BYTES", 1000)
    rows = [{"prompt": f"{'x' * 400} {n}", "category": None} for n in range(5)]
    rows.append({"prompt": "y" * 4000, "category": None})
    calibrate(_job(toy, tmp_path, server.url, rows + _prompts()), QUIET)
    sizes = [sum(len(e["messages"][-1]["content"]) for e in b["inputs"]) for b in server.batches]
    assert sorted(sizes)[-1] == 4000
    assert all(size <= 1000 for size in sorted(sizes)[:-1])


def test_prompt_too_large_for_a_request_is_named(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "BATCH_BYTES", 1000)
    rows = [*_prompts(), {"prompt": "x" * 5000, "category": None}]

    def limited(body: Body, _: int) -> tuple[int, Body] | None:
        large = any(len(e["messages"][-1]["content"]) > 4000 for e in body["inputs"])
        return (413, {"error": {"message": "the body is too large"}}) if large else None

    with (
        score_server(toy, spoil=limited) as server,
        pytest.raises(EvaluationError, match=r"prompts.jsonl:91: .* 413: the body is too large"),
    ):
        calibrate(_job(toy, tmp_path, server.url, rows), QUIET)


def test_silent_server_is_one_clear_error(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PAUSE_S", 0.0)
    with pytest.raises(EvaluationError, match=r"no server answers there .*rheostat serve"):
        calibrate(_job(toy, tmp_path, "http://127.0.0.1:9"), QUIET)


def test_server_that_stumbles_is_asked_again(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PAUSE_S", 0.0)

    def stumble(_: Body, before: int) -> tuple[int, Body] | None:
        return (503, {"error": {"message": "busy"}}) if before < 2 else None

    assert len(_spoiled(_job(toy, tmp_path, ""), stumble).rows) == 90
    with pytest.raises(EvaluationError, match="503: busy"):
        _spoiled(
            replace(_job(toy, tmp_path, ""), name="again"),
            lambda *_: (503, {"error": {"message": "busy"}}),
        )


def test_key_is_sent(toy: Path, tmp_path: Path, server: ScoreServer) -> None:
    calibrate(replace(_job(toy, tmp_path, f"{server.url}/v1/"), api_key="k"), QUIET)

    assert {headers["authorization"] for headers in server.headers} == {"Bearer k"}


def test_single_token_checkpoint_takes_every_refusal_as_its_own(tmp_path: Path) -> None:
    single = _checkpoint(tmp_path / "single", ("refuse",))

    def answer(body: Body, _: int) -> tuple[int, Body]:
        data = [
            {"index": i, "log_normaliser": 9.0, "decisions": {"refuse": {"margin": 1.0}}}
            for i in range(len(body["inputs"]))
        ]
        return 200, {"data": data}

    with score_server(single, ("refuse",), answer) as server:
        measured = calibrate(_job(single, tmp_path, server.url), QUIET)

    assert measured.calibration.prompts == {"refuse": 60}
    assert measured.calibration.benign == 30


def test_limit_draws_by_seed(toy: Path, tmp_path: Path, server: ScoreServer) -> None:
    job = _job(toy, tmp_path, server.url, _prompts(100))

    def drawn(name: str, seed: int) -> Calibration:
        files = replace(job.prompts, limit=150, seed=seed)
        return calibrate(replace(job, name=name, prompts=files), QUIET).calibration

    first, same, other = drawn("a", 1), drawn("b", 1), drawn("c", 2)
    assert len(first.category) == 150
    assert first.info.seeds == {"sample": 1}
    assert first.margins.tolist() == same.margins.tolist()
    assert first.margins.tolist() != other.margins.tolist()


def test_name_that_is_no_file_name_is_refused(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--name"):
        calibrate(replace(_job(toy, tmp_path, ""), name="../x"), QUIET)


def test_place_that_cannot_be_written_is_named(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"out/calibrations: cannot be"):
        calibrate(_job(toy, tmp_path, ""), QUIET)


def test_command_measures_and_draws(toy: Path, tmp_path: Path, server: ScoreServer) -> None:
    job = _job(toy, tmp_path, server.url)
    data = str(tmp_path / "prompts.jsonl")
    command = ["calibrate", "--model", str(toy), "--url", server.url, "--data", data, "--plot"]

    done = CliRunner().invoke(app, [*command, "--out", str(job.out)], env={"COLUMNS": "120"})

    assert done.exit_code == 0, done.output
    assert "default.safetensors: 90 prompts in" in done.output
    assert "30 benign prompts" in done.output
    assert {path.name for path in (job.folder / "calibrations").iterdir()} == {
        "default.safetensors",
        "default-curves.png",
        "default-trade-off.png",
        "default-reliability.png",
        "default-margins.png",
    }


@pytest.mark.parametrize(("shift", "status", "word"), [(0.0, 0, "fits"), (2.0, 3, "drifted")])
def test_command_checks_recorded_margins(
    toy: Path, tmp_path: Path, server: ScoreServer, shift: float, status: int, word: str
) -> None:
    measured = calibrate(_job(toy, tmp_path, server.url, _prompts(400)), QUIET)
    margins = measured.calibration.margins + shift
    counts = {name: tuple(histogram(margins[:, at]).tolist()) for at, name in enumerate(NAMES)}
    recorded = RecordedMargins(
        since="2026-11-01T00:00:00Z",
        until="2026-11-02T00:00:00Z",
        weights_sha256=measured.calibration.info.hashes.weights,
        policies={"default": PolicyMargins(rows=len(margins), counts=counts)},
    )
    save_margins(tmp_path / "margins.json", recorded)
    command = ["calibrate", "--model", str(toy), "--out", str(tmp_path / "out")]

    done = CliRunner().invoke(app, [*command, "--check", str(tmp_path / "margins.json")])

    assert done.exit_code == status, done.output
    assert f"the calibration {word}" in " ".join(done.output.split())
