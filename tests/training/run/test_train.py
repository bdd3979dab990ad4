import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from models.checkpoint import load_checkpoint
from models.errors import CheckpointError, ConfigError, EvaluationError
from tests.training.conftest import Rows, WriteRows, small_rows
from tests.training.recipes import log_of, tiny_config, weights_of
from training.config.loss import LossConfig
from training.config.recipe import TrainConfig
from training.run.assembly import memory_errors_explained
from training.run.record import describe_loss
from training.run.train import train


@pytest.fixture
def config(write_rows: WriteRows) -> TrainConfig:
    return tiny_config(write_rows(small_rows()), refusal_texts={"safety": "No."})


class Trained(NamedTuple):
    """A run that several tests look at, and its recipe; nobody changes either."""

    config: TrainConfig
    folder: Path

    def copy(self, out: Path) -> Path:
        shutil.copytree(self.folder, out)
        return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in small_rows()))
    config = tiny_config(data, refusal_texts={"safety": "No."})
    return Trained(config, train(config, tmp_path_factory.mktemp("runs") / "out"))


def test_training_from_scratch_writes_a_servable_checkpoint(trained: Trained) -> None:
    config, out = trained

    manifest, tokenizer = load_checkpoint(out)
    assert manifest.names == ["safety", "humanizing"]
    assert manifest.categories[0].refusal_text == "No."
    assert manifest.recipe is not None
    assert manifest.recipe.config_sha256 == config.sha256()
    assert (manifest.recipe.loss, manifest.recipe.seed) == ("cross_entropy", 1)
    assert len(tokenizer) <= 400
    assert yaml.safe_load((out / "resolved_config.yaml").read_text())["name"] == "small"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == (
        tokenizer.eos_token_id
    )
    assert not list(out.glob("*.bin"))
    assert [path.name for path in out.parent.iterdir() if path.is_dir()] == ["out"]


def test_training_lowers_both_parts_of_the_loss(trained: Trained) -> None:
    parts = [entry for entry in log_of(trained.folder) if "text_loss" in entry]

    assert parts[-1]["text_loss"] < 0.8 * parts[0]["text_loss"]
    assert parts[-1]["decision_loss"] < parts[0]["decision_loss"]


def test_training_twice_gives_the_same_weights(trained: Trained, tmp_path: Path) -> None:
    first = weights_of(trained.folder)
    second = weights_of(train(trained.config, tmp_path / "second"))

    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_from_a_checkpoint_adds_the_control_tokens(
    trained: Trained, tmp_path: Path
) -> None:
    config, base = trained
    known = load_checkpoint(base)[1].get_vocab()
    again = config.model_copy(
        update={"categories": {**config.categories, "medical": "asks for a diagnosis"}}
    )
    values = again.model_dump() | {"model": {"checkpoint": str(base)}}

    out = train(TrainConfig.model_validate(values), tmp_path / "out")

    manifest, tokenizer = load_checkpoint(out)
    assert manifest.names == ["safety", "humanizing", "medical"]
    assert set(tokenizer.get_vocab()) - set(known) == {"[refuse:medical]"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer)
    first = next(entry for entry in log_of(out) if "text_loss" in entry)
    last = next(entry for entry in reversed(log_of(base)) if "text_loss" in entry)
    assert first["text_loss"] < 1.2 * last["text_loss"]


def test_finished_checkpoint_is_kept_and_another_recipe_replaces_it_only_if_forced(
    trained: Trained, tmp_path: Path
) -> None:
    out = trained.copy(tmp_path / "out")
    written = (out / "model.safetensors").stat().st_mtime_ns
    other = trained.config.model_copy(update={"seed": 7})

    train(trained.config, out)
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(ConfigError, match="another recipe or other data"):
        train(other, out)

    manifest, _ = load_checkpoint(train(other, out, force=True))
    assert manifest.recipe is not None
    assert manifest.recipe.seed == 7
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


def test_one_token_for_all_refusals(config: TrainConfig, tmp_path: Path) -> None:
    values = config.model_dump(mode="json") | {"single_token": True, "refusal_texts": {}}
    values["optimisation"] |= {"epochs": 0.5}

    manifest, tokenizer = load_checkpoint(
        train(TrainConfig.model_validate(values), tmp_path / "out")
    )

    assert [token.token for token in manifest.control_tokens] == ["[refuse]", "[respond]"]
    assert "[refuse:safety]" not in tokenizer.get_vocab()


def test_changed_data_are_noticed(trained: Trained, tmp_path: Path) -> None:
    out = trained.copy(tmp_path / "out")
    manifest = json.loads((out / "rheostat.json").read_text())
    (path,) = manifest["recipe"]["data_sha256"]
    manifest["recipe"]["data_sha256"][path] = "0" * 64
    (out / "rheostat.json").write_text(json.dumps(manifest))

    with pytest.raises(ConfigError, match="other data"):
        train(trained.config, out)


def test_failed_run_leaves_no_finished_folder(
    config: TrainConfig, tmp_path: Path, write_rows: WriteRows
) -> None:
    write_rows([*small_rows(), {"prompt": "a " * 80, "category": None, "response": "b"}])

    with pytest.raises(ConfigError, match="nothing of the response"):
        train(config, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_training_that_diverges_unmeasured_leaves_no_checkpoint(
    config: TrainConfig, tmp_path: Path
) -> None:
    values = config.model_dump(mode="json")
    values["optimisation"] |= {"learning_rate": 1e30, "epochs": 2}

    with pytest.raises(EvaluationError, match="is not finite: the training has diverged"):
        train(TrainConfig.model_validate(values), tmp_path / "out")

    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "many", "reason"),
    [
        ({"hidden_size": 64 * 10**6, "heads": 10**6}, 0, "model: its weights do not fit"),
        ({}, 200, r"vocab_size: 400 leaves no room .* 203 control tokens"),
    ],
    ids=["memory", "vocabulary"],
)
def test_model_that_cannot_be_made_is_one_line(
    config: TrainConfig, tmp_path: Path, model: dict[str, int], many: int, reason: str
) -> None:
    values = config.model_dump(mode="json")
    values["model"] |= model
    values["categories"] |= {f"kind{number}": "one of many" for number in range(many)}

    with pytest.raises(ConfigError, match=reason):
        train(TrainConfig.model_validate(values), tmp_path / "out")


def test_rows_that_are_all_too_long_are_told(
    config: TrainConfig, tmp_path: Path, write_rows: WriteRows
) -> None:
    write_rows([row | {"prompt": f"{'very ' * 80}{row['prompt']}"} for row in small_rows()])
    values = config.model_dump(mode="json")
    values["data"]["too_long"] = "drop"

    with pytest.raises(ConfigError, match="no row is left: all are longer than"):
        train(TrainConfig.model_validate(values), tmp_path / "out")


def _grown(folder: Path, field: str) -> None:
    path = folder / "config.json"
    described = json.loads(path.read_text())
    described[field] *= 2
    described.pop("layer_types", None)
    path.write_text(json.dumps(described))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("breaks", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "the model cannot be loaded: "),
        (_cut, "the model cannot be loaded: "),
        (lambda folder: _grown(folder, "intermediate_size"), "6 are of another shape, the first "),
        (lambda folder: _grown(folder, "num_hidden_layers"), "18 are missing, the first is model."),
    ],
    ids=["absent", "cut", "shape", "missing"],
)
def test_checkpoint_whose_weights_are_not_whole_is_refused(
    trained: Trained, tmp_path: Path, breaks: Callable[[Path], None], reason: str
) -> None:
    base = trained.copy(tmp_path / "base")
    breaks(base)
    values = trained.config.model_dump(mode="json") | {"model": {"checkpoint": str(base)}}

    with pytest.raises(CheckpointError) as raised:
        train(TrainConfig.model_validate(values), tmp_path / "out")

    assert raised.value.message.startswith(f"{base}: ")
    assert reason in raised.value.message


def test_link_is_no_place_for_a_new_checkpoint(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists and is not a checkpoint"):
        train(trained.config, out)
    out.unlink()
    out.symlink_to(trained.folder)

    assert train(trained.config, out) == out
    with pytest.raises(ConfigError, match="is a symbolic link"):
        train(trained.config, out, force=True)


def test_data_of_which_nothing_is_learnt_are_refused(write_rows: WriteRows, tmp_path: Path) -> None:
    rows: Rows = [
        {"prompt": f"Tell {number}", "category": category, "response": None, "pair": "p"}
        for number in range(4)
        for category in ("safety", None)
    ]

    with pytest.raises(ConfigError, match=r"nothing would be learnt.*pair_weight"):
        train(tiny_config(write_rows(rows)), tmp_path / "out")


def test_stale_checkpoint_is_replaced_where_that_is_asked_for(
    trained: Trained, tmp_path: Path
) -> None:
    config, out = trained.config, trained.copy(tmp_path / "checkpoint")
    other = config.model_copy(update={"seed": config.seed + 1})
    made = load_checkpoint(train(other, out, replace_stale=True))[0].recipe
    assert made is not None
    assert made.seed == other.seed
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert train(other, out, replace_stale=True) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before


# --- what a run measures and reports --------------------------------------------------------------


def _measured(config: TrainConfig, **changes: Any) -> TrainConfig:
    assert config.data.train != "demo"
    path = config.data.train[0].path
    evaluation = {"data": [path], "every": 0.25} | changes
    return TrainConfig.model_validate(config.model_dump(mode="json") | {"evaluation": evaluation})


def test_measuring_on_the_way_changes_no_weight(trained: Trained, tmp_path: Path) -> None:
    plain = weights_of(trained.folder)
    out = train(_measured(trained.config, best="last"), tmp_path / "measured")

    measured = weights_of(out)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    steps = [line["step"] for line in log_of(out) if "eval_auc" in line]
    assert steps == [0, 5, 10, 15, 20]
    last = next(line for line in log_of(out) if "final" in line)
    assert last["kept_step"] == 20
    assert last["text_loss_after"] < last["text_loss_before"]
    figures = {path.name for path in (out / "plots").glob("*.png")}
    assert {"loss.png", "margins.png", "reliability.png"} <= figures


def test_measurement_before_the_first_step_can_be_switched_off(
    config: TrainConfig, tmp_path: Path
) -> None:
    out = train(_measured(config, best="last", every=1, at_start=False), tmp_path / "out")

    assert [line["step"] for line in log_of(out) if "eval_auc" in line] == [20]
    assert next(line for line in log_of(out) if "final" in line)["text_loss_before"] is None


@pytest.mark.parametrize(("best", "choose"), [("auc", max), ("loss", min)])
def test_weights_of_the_best_measurement_are_exported(
    config: TrainConfig, tmp_path: Path, best: str, choose: Callable[[list[float]], float]
) -> None:
    # A learning rate that spoils what was learnt.
    values = config.model_dump(mode="json")
    values["optimisation"] |= {"learning_rate": 0.05, "scheduler": "constant_with_warmup"}
    hot = _measured(TrainConfig.model_validate(values), best=best)

    out = train(hot, tmp_path / "out")

    lines = [line for line in log_of(out) if f"eval_{best}" in line and line["step"] > 0]
    final = next(line for line in log_of(out) if "final" in line)
    wanted = choose([line[f"eval_{best}"] for line in lines])
    assert final["final"][best] == pytest.approx(wanted, abs=1e-6)
    first = next(line["step"] for line in lines if line[f"eval_{best}"] == wanted)
    assert final["kept_step"] == first


def test_metric_that_is_lost_with_rows_that_are_too_long_is_refused_before_the_search(
    write_rows: WriteRows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(write_rows(small_rows()), loss={"decision": {"q": "auto"}})
    held_out = tmp_path / "held_out.jsonl"
    rows = [
        {**row, "response": str(row["response"]) * (1 if row["category"] else 20)}
        for row in small_rows()
    ]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = config.data.model_copy(update={"too_long": "drop"})
    config = _measured(config.model_copy(update={"data": data}), data=[str(held_out)])

    with pytest.raises(ConfigError, match="none is to be answered"):
        train(config, tmp_path / "out")

    assert "auto: choosing" not in capsys.readouterr().err


def test_events_for_tensorboard_hold_the_parts_of_the_loss(
    config: TrainConfig, tmp_path: Path
) -> None:
    values = _measured(config).model_dump(mode="json") | {"report_to": ["tensorboard"]}
    out = train(TrainConfig.model_validate(values), tmp_path / "out")

    module: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    found = [event.value for event in events.Scalars("train/decision_loss")]
    logged = [line["decision_loss"] for line in log_of(out) if "decision_loss" in line]
    assert found == pytest.approx(logged)
    assert "eval/auc" in events.Tags()["scalars"]


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ({"decision": {"weight": 3}}, "cross_entropy"),
        (
            {"decision": {"q": 0.3, "gamma": 1}},
            "flexible(decision q=0.3 gamma=1, text q=0 gamma=0)",
        ),
        (
            {"decision": {"q": {"safety": 0.5}}, "text": {"q": {"start": 1, "end": 0}}},
            "flexible(decision q={safety: 0.5} gamma=0, text q=1 to 0 over 1 gamma=0)",
        ),
    ],
)
def test_manifest_names_the_loss(loss: dict[str, Any], told: str) -> None:
    assert describe_loss(LossConfig.model_validate(loss)) == told


def test_memory_that_does_not_suffice_is_told_with_what_to_change() -> None:
    with (
        pytest.raises(ConfigError, match=r"out of memory: lower optimisation\.batch_size"),
        memory_errors_explained(),
    ):
        torch.empty(2**55, dtype=torch.float64)


def test_other_failures_keep_their_own_words() -> None:
    with pytest.raises(RuntimeError, match="another"), memory_errors_explained():
        raise RuntimeError("another")


def test_wandb_gets_the_log_without_a_network(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "log")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "log").mkdir()
    values = config.model_dump(mode="json") | {"report_to": ["wandb"]}
    values["optimisation"] |= {"epochs": 0.5}

    train(TrainConfig.model_validate(values), tmp_path / "out")

    assert list((tmp_path / "log").rglob("*.wandb"))
