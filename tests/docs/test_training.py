"""docs/training.md, followed step by step at small size."""

import csv
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from transformers import AutoTokenizer
from typer.main import get_command
from typer.testing import CliRunner

from models.checkpoint import load_checkpoint
from models.errors import ConfigError, EvaluationError
from rheostat import app
from tests.docs.test_readme import ROOT, commands
from tests.toy import byte_tokenizer, tiny_model
from tests.training.recipes import MODEL, log_of
from training.calibration.prompts import Prompts, read_prompts
from training.config.data import named_sources
from training.config.loss import LossConfig, QSchedule
from training.config.recipe import TrainConfig, load_config, packaged_recipes
from training.data.rows import Row
from training.data.sources import draw_rows, read
from training.run.train import train

PAGE = ROOT / "docs" / "training.md"
TEXT = PAGE.read_text(encoding="utf-8")
CATEGORIES = ["safety", "humanizing", "incomplete", "indeterminate", "unsupported", "medicine"]
COCONOT_LABELS = ("Humanizing requests", "Incomplete requests", "Indeterminate requests")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


RECIPE, LOSSES, SOURCES = _blocks("yaml")
(TABLE,) = _blocks("csv")


def section(number: int) -> str:
    return re.split(r"^## ", TEXT, flags=re.MULTILINE)[number]


def cells_of(section: str) -> list[list[str]]:
    """Returns the cells of the rows of a section's tables."""
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- a reader's folder ----------------------------------------------------------------------------


def _table(rows: list[dict[str, str]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _turns(number: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Tell me about {number}."},
        {"role": "assistant", "content": f"It is the number {number}."},
    ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    # Tiny models: threads that wait for each other cost more than they compute.
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with the page's recipe and table, and small stand-ins for what is public."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refusals.csv").write_text(TABLE)
    held_out = [
        {name: cell.replace("?", ", please?") if name == "question" else cell for name, cell in r}
        for r in (row.items() for row in csv.DictReader(io.StringIO(TABLE)))
    ]
    (tmp_path / "held-out.csv").write_text(_table(held_out))
    tokenizer = byte_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(tmp_path / "instruct")
    tokenizer.save_pretrained(tmp_path / "instruct")
    numbered = [(n, COCONOT_LABELS[n % 3]) for n in range(12)]
    _lines(
        tmp_path / "original.jsonl",
        [{"prompt": f"What {n}?", "response": "No.", "category": label} for n, label in numbered],
    )
    _lines(
        tmp_path / "pref.jsonl",
        [{"prompt": f"And {n}?", "chosen": _turns(n), "category": label} for n, label in numbered],
    )
    _lines(tmp_path / "chats.jsonl", [{"messages": _turns(n)} for n in range(20)])
    (tmp_path / "mine.yaml").write_text(_dumped(_at_home(yaml.safe_load(RECIPE))))
    return tmp_path


def _dumped(recipe: dict[str, Any]) -> str:
    # The order of the categories counts.
    return yaml.safe_dump(recipe, sort_keys=False)


def _at_home(recipe: dict[str, Any]) -> dict[str, Any]:
    """Returns the page's recipe with what lies on the hub replaced, and few steps."""
    recipe["model"]["checkpoint"] = "instruct"
    for source in recipe["data"]["train"]:
        if "hub" in source:
            name = source.get("subset", "chats")
            for field in ("hub", "split", "subset"):
                source.pop(field, None)
            source |= {"path": f"{name}.jsonl"}
            source |= {"subset": name} if name != "chats" else {}
    recipe["optimisation"] |= {"gradient_accumulation_steps": 1, "max_length": 256}
    recipe["evaluation"] |= {"every": 1}
    return recipe


# --- the recipe -----------------------------------------------------------------------------------


def test_recipe_loads_as_it_stands_on_the_page(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)

    assert list(load_config(path).categories) == CATEGORIES


def test_loss_block_loads_within_the_recipe() -> None:
    values = {**yaml.safe_load(RECIPE), **yaml.safe_load(LOSSES)}

    loss = TrainConfig.model_validate(values).loss

    assert isinstance(loss, LossConfig)
    assert loss.decision.q == QSchedule(start=0, end=0.7, over=0.5)
    assert loss.decision.gamma == {"medicine": 0.5, "respond": 1}


def test_table_reads_as_the_page_says(folder: Path) -> None:
    rows = _rows(load_config("mine.yaml"))

    assert [row.category for row in rows] == [
        *("safety", "safety", None),
        *("medicine", "medicine", None, None, None),
    ]
    assert [row.near_miss for row in rows if row.near_miss] == ["safety", "medicine"]
    assert [row.pair for row in rows if row.pair] == ["m1", "m1"]
    assert all(row.response for row in rows)


def _rows(config: TrainConfig) -> list[Row]:
    source = config.data.train[0]
    assert not isinstance(source, str)
    return read(source, config.categories).rows


def test_table_without_responses_teaches_decisions(folder: Path) -> None:
    recipe = yaml.safe_load((folder / "mine.yaml").read_text())
    recipe["data"]["train"][0]["columns"]["response"] = None

    rows = _rows(TrainConfig.model_validate(recipe))

    assert {row.response for row in rows} == {None}


def test_dry_run_shows_what_the_page_lists(folder: Path) -> None:
    shown = CliRunner().invoke(app, ["train", "mine.yaml", "--dry-run"])

    assert shown.exit_code == 0, shown.output
    order = [
        "Rows taken, by source and category",
        "Duplicates: none",
        "Prompts with conflicting labels: none",
        "Near misses:",
        "Counterfactual pairs: 1",
        "Tokens a row",
        "[refuse:medicine]That is for your doctor",
        "The training",
    ]
    places = [shown.output.index(text) for text in order[:6]]
    assert places == sorted(places)
    assert all(text in shown.output for text in order)
    # Nothing that the user said is learnt.
    assert not re.search("«[^»]*How do I", shown.output)
    assert not (folder / "checkpoints").exists()


def test_model_that_is_out_of_reach_still_shows_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = yaml.safe_load((folder / "mine.yaml").read_text())
    recipe["model"] = {"checkpoint": "nobody/has-this-one"}
    (folder / "mine.yaml").write_text(_dumped(recipe))

    shown = CliRunner().invoke(app, ["train", "mine.yaml", "--dry-run"])

    assert shown.exit_code == 0, shown.output
    assert "Rows taken" in shown.output
    assert "Lengths, samples and time are not shown" in shown.output


# --- the run and its folder -----------------------------------------------------------------------


def test_page_leads_to_a_checkpoint_that_can_be_served(folder: Path) -> None:
    done = CliRunner().invoke(app, ["train", "mine.yaml", "--out", "checkpoints/mine"])

    assert done.exit_code == 0, done.output
    out = folder / "checkpoints" / "mine"
    manifest, tokenizer = load_checkpoint(out)
    assert manifest.names == CATEGORIES
    assert manifest.categories[-1].refusal_text == "Please ask a doctor or a pharmacist."
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained("instruct").chat_template
    _check_folder(out)
    _check_log(out)


def test_scratch_model_takes_the_same_data(folder: Path) -> None:
    recipe = yaml.safe_load((folder / "mine.yaml").read_text())
    del recipe["lora"]
    recipe["model"] = MODEL
    recipe["optimisation"] |= {"max_length": 64, "bf16": False, "learning_rate": 1e-3}
    recipe["report_to"] = []
    (folder / "scratch.yaml").write_text(_dumped(recipe))

    shown = CliRunner().invoke(app, ["train", "scratch.yaml", "--dry-run"])
    out = train(load_config("scratch.yaml"), folder / "out")

    assert shown.exit_code == 0, shown.output
    assert "measured: " in shown.output
    assert load_checkpoint(out)[0].names == CATEGORIES


def _check_folder(out: Path) -> None:
    named = set(re.findall(r"`([\w-]+(?:\.\w+|/))`", section(8)))
    promised = {name for name in named if name.rstrip("/") in {p.name for p in out.iterdir()}}
    assert promised == {
        *("model.safetensors", "rheostat.json", "resolved_config.yaml", "training_log.jsonl"),
        *("plots/", "tensorboard/"),
    }
    figures = set(re.findall(r"`(\w+\.png)`", section(7)))
    assert {path.name for path in (out / "plots").iterdir()} == figures


def _check_log(out: Path) -> None:
    page = set(re.findall(r"`(\w+)`", section(7)))
    steps, measured, closing = set[str](), set[str](), set[str]()
    for line in log_of(out):
        if "loss" in line:
            steps |= set(line)
        elif "eval_auc" in line:
            measured |= {name.removeprefix("eval_") for name in line}
        elif "train_loss" not in line:
            closing |= {name for name in line if not name.endswith("_s")}
    assert steps <= page
    assert {name for name in measured if "/" not in name} <= page
    assert closing <= page
    assert {"decision_loss", "grad_norm"} <= steps
    assert {"auc", "near_miss_refused", "text_loss"} <= measured
    assert {"data", "kept_step", "final", "text_loss_before", "text_loss_after"} <= closing


# --- commands -------------------------------------------------------------------------------------


def _tool(name: str) -> list[list[str]]:
    return [words[1:] for words in commands(PAGE) if words[0] == f".venv/bin/{name}"]


def test_rheostat_commands_are_there() -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    used = {name for name, *_ in _tool("rheostat")}

    assert used == {
        "train",
        "serve",
        "evaluate",
        "calibrate",
        "add-category",
        "responses",
        "remove-category",
    }
    for name in used:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
        assert name in known


def test_launch_commands_parse() -> None:
    for words in _tool("accelerate"):
        assert words[0] == "launch"
        launch = launch_command_parser().parse_args(words[1:])
        assert (launch.module, launch.training_script) == (True, "rheostat")
        command, recipe = launch.training_script_args
        assert command == "train"
        assert recipe in {*packaged_recipes(), "mine.yaml"}
        if launch.config_file is not None:
            settings: Any = load_config_from_file(str(ROOT / launch.config_file))
            assert settings.distributed_type == "FSDP"
            assert settings.num_processes == 8


def test_tensorboard_command_shows_what_the_run_writes(folder: Path) -> None:
    (words,) = _tool("tensorboard")
    (logs,) = _after(words, "--logdir")
    recipe = _at_home(yaml.safe_load(RECIPE))
    recipe["optimisation"]["learning_rate"] = 1e300

    with pytest.raises(EvaluationError):  # so that the folder keeps its name of the way
        train(TrainConfig.model_validate(recipe), folder / "checkpoints" / "mine")

    assert list((folder / logs).glob("events*"))
    assert importlib.util.find_spec("tensorboard.main") is not None


def test_calibrate_reads_the_table_with_the_page_s_list(folder: Path) -> None:
    (words,) = [words for words in _tool("rheostat") if words[0] == "calibrate"]
    rows = list(csv.DictReader(io.StringIO(TABLE)))
    (folder / "held-out.csv").write_text(
        _table(
            [
                {**row, "question": f"{n}.{place}: {row['question']}", "twin": ""}
                for n in range(20)
                for place, row in enumerate(
                    [*rows, *({**rows[0], "label": name} for name in CATEGORIES[1:5])]
                )
            ]
        )
    )

    (name,) = _after(words, "--data")
    (folder / name).write_text(SOURCES)
    prompts = read_prompts(Prompts(named_sources(Path(name))), CATEGORIES)

    assert len(prompts) == 240
    assert {row.category for row in prompts} == {*CATEGORIES, None}


def _after(words: list[str], option: str) -> list[str]:
    return [words[at + 1] for at, word in enumerate(words) if word == option]


def test_evaluate_reads_the_tables_with_the_page_s_lists(folder: Path) -> None:
    (words,) = [words for words in _tool("rheostat") if words[0] == "evaluate"]
    lists = [name for option in ("--data", "--train-data") for name in _after(words, option)]
    for name, text in zip(
        lists, (SOURCES, SOURCES.replace("held-out.csv", "refusals.csv")), strict=True
    ):
        (folder / name).write_text(text)
        rows = draw_rows(named_sources(Path(name)), CATEGORIES, seed=0, say=print)
        assert [row.category for row in rows[2:4]] == [None, "medicine"]
        assert all(row.response for row in rows)


def test_every_recipe_of_the_package_is_told() -> None:
    named = {cells[0].strip("`") for cells in cells_of(section(4)) if len(cells) == 2}

    assert named == set(packaged_recipes())


# --- messages -------------------------------------------------------------------------------------


WRONG = {
    "has no column": ("question,", "frage,"),
    "category is empty": ("harmful", "harmful"),
    "is unknown; known are safety": ("medical", "medcial"),
    "has 6 cells, the header 5": ('"Lima."', "Well, Lima."),
    "has no answered row of this prompt": ('growth.",,m1', 'growth.",,m2'),
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_table_ends_the_run_with_the_page_s_message(said: str, folder: Path) -> None:
    recipe = yaml.safe_load((folder / "mine.yaml").read_text())
    if said == "category is empty":
        del recipe["data"]["train"][0]["categories"][""]
    (folder / "refusals.csv").write_text(TABLE.replace(*WRONG[said]))

    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        train(TrainConfig.model_validate(recipe), folder / "out")
    assert str(raised.value.message).startswith("refusals.csv")
    assert not (folder / "out").exists()
