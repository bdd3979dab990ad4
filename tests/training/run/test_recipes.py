import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from models.checkpoint import load_checkpoint
from models.errors import ConfigError
from tests.toy import byte_tokenizer, tiny_model
from tests.training.recipes import log_of, losses_of
from training.config.recipe import CheckpointModel, TrainConfig, load_config, packaged_recipes
from training.demo_data.render import as_json_lines, render
from training.run.preview import dry_run
from training.run.train import train

LABELS = (
    "Requests with safety concerns",
    "Humanizing requests",
    "Incomplete requests",
    "Indeterminate requests",
    "Unsupported requests",
)
LARGE = ["llama-8b-full", "qwen-instruct-lora"]


def _write(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.name


def _refused(number: int, label: str) -> dict[str, Any]:
    prompt = f"Question {number} of those that are called {label}?"
    return {
        "id": str(number),
        "prompt": prompt,
        "response": f"No, not {number}.",
        "category": label,
        "subcategory": "",
    }


def _preferred(number: int, label: str) -> dict[str, Any]:
    prompt = f"Harmless question {number} next to {label}?"
    turns = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": f"Yes, {number}."},
    ]
    return {"id": str(number), "prompt": prompt, "chosen": turns, "category": label}


def _chat(number: int) -> dict[str, Any]:
    turns = [
        {"role": "user", "content": f"Tell me about {number}."},
        {"role": "assistant", "content": f"It is the number {number}."},
        {"role": "user", "content": "And what is next?"},
        {"role": "assistant", "content": f"After it comes {number + 1}."},
    ]
    return {"prompt": turns[0]["content"], "prompt_id": str(number), "messages": turns}


# Sets that name only prompts: configuration, split and column as on the hub.
PROMPTS = {
    "walledai/AdvBench": ("default", "train", "prompt"),
    "declare-lab/CategoricalHarmfulQA": ("default", "en", "Question"),
    "mandarjoshi/trivia_qa": ("rc.nocontext", "train", "question"),
    "openai/gsm8k": ("main", "train", "question"),
    "yizhongw/self_instruct": ("human_eval", "train", "instruction"),
}


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """Returns folders laid out like the hub's repositories, by the names there."""
    coconot, chats, model = (tmp_path / name for name in ("coconot", "ultrachat", "base"))
    for folder in (coconot, chats):
        folder.mkdir()
    refused = [_refused(number, LABELS[number % 5]) for number in range(60)]
    preferred = [_preferred(number, LABELS[number % 5]) for number in range(20)]
    files = {
        "original": _write(coconot, "original", refused),
        "pref": _write(coconot, "pref", preferred),
    }
    lines = (
        f"- config_name: {name}\n  data_files: [{{split: train, path: {file}}}]"
        for name, file in files.items()
    )
    _front_matter(coconot, "\n".join(lines))
    train_file = _write(chats, "train_sft", [_chat(number) for number in range(40)])
    test_file = _write(chats, "test_sft", [_chat(number) for number in range(50, 60)])
    _front_matter(
        chats,
        "- config_name: default\n  data_files:\n"
        f"  - {{split: train_sft, path: {train_file}}}\n"
        f"  - {{split: test_sft, path: {test_file}}}",
    )
    tokenizer = byte_tokenizer()
    tiny_model(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    responses = tmp_path / "responses.jsonl"
    responses.write_bytes(as_json_lines(render(0)["train"][:200]))
    return {
        "allenai/coconot": str(coconot),
        "HuggingFaceH4/ultrachat_200k": str(chats),
        "model": str(model),
        "responses.jsonl": str(responses),
        **{
            name: _prompts(tmp_path / str(number), *where)
            for number, (name, where) in enumerate(PROMPTS.items())
        },
    }


def _prompts(folder: Path, config: str, split: str, column: str) -> str:
    folder.mkdir()
    file = _write(folder, "prompts", [{column: f"Question {n}?", "other": n} for n in range(20)])
    _front_matter(
        folder,
        f"- config_name: {config}\n  data_files: [{{split: {split}, path: {file}}}]",
    )
    return str(folder)


def _front_matter(folder: Path, configs: str) -> None:
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")


def _at_home(config: TrainConfig, hub: dict[str, str]) -> TrainConfig:
    """Returns a recipe with its hub names replaced by folders, and nothing else."""
    values = config.model_dump(mode="json")
    for origin in (values["data"]["train"], (values["evaluation"] or {}).get("data")):
        for source in origin if isinstance(origin, list) else ():
            for field in ("hub", "path"):
                if source[field] is not None:
                    source[field] = hub[source[field]]
    if "checkpoint" in values["model"]:
        values["model"]["checkpoint"] = hub["model"]
    return TrainConfig.model_validate(values)


# The demo's recipe is trained by `make demo`; `single-token` has the same data and model.
@pytest.mark.parametrize("name", sorted({*packaged_recipes()} - {"demo"}))
def test_recipe_loads_and_dry_runs(name: str, hub: dict[str, str], tmp_path: Path) -> None:
    config = _at_home(load_config(name), hub)
    console = Console(record=True, width=120, file=(tmp_path / "shown").open("w"))

    dry_run(config, console)

    assert config.name == name
    shown = console.export_text()
    assert "[respond]" in shown
    assert ("[refuse]" in shown) == config.single_token
    assert ("[refuse:safety]" in shown) != config.single_token


@pytest.mark.parametrize("name", LARGE)
def test_recipe_of_a_large_model_trains_a_small_one(
    name: str, hub: dict[str, str], tmp_path: Path
) -> None:
    config = _at_home(load_config(name), hub)
    few = {"gradient_accumulation_steps": 1, "learning_rate": 1e-3, "max_length": 256}
    values = config.model_dump(mode="json")
    values["optimisation"] |= few
    small = TrainConfig.model_validate(values)

    out = train(small, tmp_path / "out")

    manifest, tokenizer = load_checkpoint(out)
    assert len(manifest.names) == 5
    assert manifest.recipe is not None
    assert manifest.recipe.loss == "cross_entropy"
    assert losses_of(out)
    final = next(line for line in log_of(out) if "final" in line)
    assert 0 <= final["final"]["auc"] <= 1
    assert final["text_loss_before"] > 0
    assert list((out / "tensorboard").glob("events*"))
    template = tokenizer.chat_template
    assert isinstance(small.model, CheckpointModel)
    own = AutoTokenizer.from_pretrained(hub["model"]).chat_template
    assert (template == own) == (small.model.chat_template is None)


def test_base_model_without_a_template_is_told_what_to_set(
    hub: dict[str, str], tmp_path: Path
) -> None:
    (Path(hub["model"]) / "chat_template.jinja").unlink()
    values = _at_home(load_config("qwen-instruct-lora"), hub).model_dump(mode="json")
    out = tmp_path / "out"

    with pytest.raises(ConfigError, match=r"no chat template; set model\.chat_template"):
        train(TrainConfig.model_validate(values), out)
    values["model"]["chat_template"] = str(tmp_path / "none.jinja")
    with pytest.raises(ConfigError, match=r"none\.jinja cannot be read"):
        train(TrainConfig.model_validate(values), out)
