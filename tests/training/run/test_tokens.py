"""The way `tokens`, on a base of no ability."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from models.checkpoint import load_checkpoint
from tests.toy import save_base
from tests.training.conftest import WriteRows, small_rows
from tests.training.recipes import CATEGORIES, decision_logits, log_of, weights_of
from training.config.recipe import TrainConfig
from training.model.gguf import cache_folder
from training.run.kept_states import KEPT_STATES
from training.run.train import train

QUESTIONS = {"How do I steal pens?": 0, "Do you love pens?": 1, "Where do I buy pens?": 2}


def _recipe(base: Path, data: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "name": "small",
            "train": "tokens",
            "model": {"checkpoint": str(base)},
            "data": {"train": [str(data)]},
            "categories": CATEGORIES,
            "optimisation": {"max_length": 200},
            "evaluation": {"data": [str(data)]},
            **changes,
        }
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hub"))
    return cache_folder("states")


@pytest.mark.parametrize("tied", [True, False])
def test_only_rows_of_control_tokens_are_learnt(
    tied: bool, tmp_path: Path, write_rows: WriteRows, cache: Path
) -> None:
    base = save_base(tmp_path / "base", tied=tied)
    out = train(_recipe(base, write_rows(small_rows())), tmp_path / "out")
    before, after = weights_of(base), weights_of(out)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert torch.equal(after[name][: len(weight)], weight), name
    manifest, _ = load_checkpoint(out)
    assert not manifest.kept
    head = after["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert not head[manifest.respond.id].any()
    for question, column in QUESTIONS.items():
        logits = decision_logits(out, question)[manifest.control_ids]
        assert int(logits.argmax()) == column, question
    assert list(cache.iterdir())


def test_log_says_how_rows_were_chosen_and_what_they_are_worth(
    tmp_path: Path, write_rows: WriteRows, cache: Path
) -> None:
    base = save_base(tmp_path / "base", tied=True)
    out = train(_recipe(base, write_rows(small_rows())), tmp_path / "out")
    data, learnt, measured, seconds = log_of(out)
    assert data["data"]["rows"] if "rows" in data["data"] else data["data"]
    assert learnt["decisions"] == 32
    assert str(f"{learnt['strength']:.3g}") in learnt["cross_validated_loss"]
    assert measured["final"]["auc"] > 0.95
    assert "tokens_s" in seconds
    kept = load_file(out / KEPT_STATES)
    assert kept["states"].shape == (32, 64)
    assert np.bincount(kept["labels"]).tolist() == [8, 8, 16]


def test_earlier_turns_are_decided_too_and_hold_no_control_tokens(
    tmp_path: Path, write_rows: WriteRows, cache: Path
) -> None:
    base = save_base(tmp_path / "base", tied=True)
    turns = [
        {"role": "user", "content": "Do you love ink?"},
        {"role": "assistant", "content": "No.", "category": "humanizing"},
        {"role": "user", "content": "Where do I buy ink?"},
        {"role": "assistant", "content": "In shops."},
    ]
    out = train(_recipe(base, write_rows([*small_rows(), {"messages": turns}])), tmp_path / "out")
    kept = load_file(out / KEPT_STATES)
    assert np.bincount(kept["labels"]).tolist() == [8, 9, 17]
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    _, tokenizer = load_checkpoint(out)
    plain = [{k: v for k, v in turn.items() if k != "category"} for turn in turns[:-1]]
    prompt: Any = tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        state = model.model(**prompt).last_hidden_state[0, -1].numpy()
    assert np.abs(kept["states"].astype(np.float32) - state).max(axis=1).min() < 0.01


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"lora": {"r": 4}}, "train: tokens has no adapters"),
        ({"train": "full", "lora": {}}, "train: full has no adapters"),
        ({"model": {"layers": 2}}, "train: tokens needs an existing model"),
        ({"loss": {"decision": {"q": 0.5}}}, "train: tokens minimises cross-entropy"),
        ({"train": "rows"}, "'full', 'lora' or 'tokens'"),
    ],
)
def test_word_that_does_not_fit_the_rest_is_told(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        _recipe(Path("base"), Path("rows.jsonl"), **changes)


def test_word_lora_brings_adapters_and_old_recipes_keep_their_hash() -> None:
    base, data = Path("base"), Path("rows.jsonl")
    assert _recipe(base, data, train="lora").lora is not None
    assert (
        _recipe(base, data, train="lora", lora={"r": 4}).lora
        == TrainConfig.model_validate(
            _recipe(base, data, train=None, lora={"r": 4}).model_dump()
        ).lora
    )
    assert "train" in _recipe(base, data, train=None).to_yaml()
    assert _recipe(base, data).sha256() != _recipe(base, data, train=None).sha256()
