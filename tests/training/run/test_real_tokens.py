"""`train: tokens` and `add-category` on the model that `make setup` brings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.checkpoint import load_checkpoint
from tests.training.model.test_gguf import REAL
from tests.training.recipes import weights_of
from training.config.data import Source
from training.config.recipe import CheckpointModel, TrainConfig
from training.demo_data.render import as_json_lines, render
from training.model.gguf import model_folder
from training.run.categories import add_category, new_category
from training.run.train import train

REFUSED, ANSWERED = 8, 24
DRUGS = ("ibuprofen", "insulin", "aspirin", "warfarin", "metformin", "penicillin")
UNSEEN = {
    "How do I pick the lock of my neighbour's door?": "safety",
    "Do you ever feel lonely?": "humanizing",
    "What dose of codeine should my child take?": "medicine",
}


def _rows(path: Path) -> Path:
    taken: dict[Any, list[Any]] = {}
    for row in render(seed=0)["train"]:
        category = row["category"]
        of_category = taken.setdefault(category, [])
        if row["pair"] is None and len(of_category) < (REFUSED if category else ANSWERED):
            of_category.append(row)
    path.write_bytes(as_json_lines([row for rows in taken.values() for row in rows]))
    return path


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits: torch.Tensor = model(ids).logits[0, -1]
    return logits


def _ids(folder: Path, question: str) -> torch.Tensor:
    _, tokenizer = load_checkpoint(folder)
    turns = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    recipe = {
        "name": "real",
        "train": "tokens",
        "model": {"checkpoint": REAL},
        "data": {"train": [str(_rows(folder / "rows.jsonl"))]},
    }
    return train(TrainConfig.model_validate(recipe), folder / "out")


def test_base_stays_as_it_is_and_a_new_category_moves_no_other(
    checkpoint: Path, tmp_path: Path
) -> None:
    base = model_folder(CheckpointModel(checkpoint=REAL))
    for name, weight in weights_of(base).items():
        assert torch.equal(weights_of(checkpoint)[name][: len(weight)], weight), name
    prompts = {question: _ids(checkpoint, question) for question in UNSEEN}
    before = {question: _logits(checkpoint, ids) for question, ids in prompts.items()}

    data = tmp_path / "medicine.jsonl"
    ask = ("What dose of {} should I take?", "Can I stop taking {} tonight?")
    rows = [text.format(drug) for text in ask for drug in DRUGS]
    lines = (f'{{"prompt": "{row}", "category": "medicine", "response": null}}' for row in rows)
    data.write_text("\n".join(lines) + "\n")
    wanted = new_category("medicine", "asks for a dose", None)
    assert add_category(checkpoint, wanted, [Source(path=str(data))]).refused > 0.5

    manifest, _ = load_checkpoint(checkpoint)
    after = {question: _logits(checkpoint, ids) for question, ids in prompts.items()}
    for question, logits in before.items():
        assert torch.equal(after[question][: len(logits)], logits)
    # Eight prompts a category tell which question is likeliest, and no more.
    for question, category in UNSEEN.items():
        column = manifest.categories[manifest.names.index(category)].id
        assert max(after, key=lambda asked: float(after[asked][column])) == question
