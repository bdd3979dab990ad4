from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.errors import ConfigError
from models.manifest import Manifest
from models.tokens import add_control_tokens
from tests.toy import byte_tokenizer, tiny_model
from tests.training.conftest import WriteRows, small_rows
from training.data.encoding import Row, read_rows
from training.measure.flips import count_flips, flip_fidelity, generate
from training.measure.judge import Judge
from training.measure.monitor import DecisionMonitor
from training.measure.report import ANSWER, Share

NAMES = {"safety": "harms", "humanizing": "takes it for a person"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def manifest(tokenizer: PreTrainedTokenizerFast) -> Manifest:
    return add_control_tokens(tokenizer, NAMES)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, manifest: Manifest) -> LlamaForCausalLM:
    del manifest  # it adds the control tokens that the model needs rows for
    model = tiny_model(len(tokenizer), seed=3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


@pytest.fixture
def rows(write_rows: WriteRows) -> list[Row]:
    return read_rows(write_rows(small_rows()), NAMES)


def _slow_text(
    model: Any, tokenizer: PreTrainedTokenizerFast, manifest: Manifest, ids: list[int], count: int
) -> str:
    text: list[int] = []
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids + text])).logits[0, -1]
            logits[manifest.control_ids] = -torch.inf
            text.append(int(logits.argmax()))
            if text[-1] == tokenizer.eos_token_id:
                break
    return str(tokenizer.decode(text, skip_special_tokens=True)).strip()


def test_texts_of_a_padded_batch_are_those_of_a_plain_loop(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, manifest: Manifest
) -> None:
    words = ("Hi", "What are these things?", "No", "Tell me more.")
    ids = [tokenizer.encode(f"<|user|>{word}<|end|><|assistant|>") for word in words]
    prompts = [[*one, manifest.control_ids[at % 3]] for at, one in enumerate(ids)]

    found = generate(model.train(), tokenizer, manifest, prompts, 3, 8)

    model.train(mode=False)
    wanted = [_slow_text(model, tokenizer, manifest, prompt, 8) for prompt in prompts]
    assert found == wanted
    assert len(set(found)) > 1


def test_each_prompt_is_forced_against_the_models_own_choice(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    manifest: Manifest,
    rows: list[Row],
) -> None:
    margins = DecisionMonitor(rows, tokenizer, manifest, max_length=None).measure(model).margins
    refused = int((margins.max(axis=1) >= 0).sum())

    found = flip_fidelity(
        model,
        tokenizer,
        manifest,
        rows,
        Judge(rows),
        sample=1000,
        seed=0,
        max_length=None,
        max_new_tokens=4,
    )

    assert found["flip_to_respond"].total == refused
    forced = [found[f"flip_to_refuse/{name}"].total for name in NAMES]
    assert sum(forced) == len(rows) - refused
    assert list(found) == ["flip_to_respond", "flip_to_refuse/safety", "flip_to_refuse/humanizing"]


def test_sample_is_drawn_by_its_seed_among_rows_that_fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    manifest: Manifest,
    rows: list[Row],
) -> None:
    def total(sample: int, max_length: int | None) -> int:
        found = flip_fidelity(
            model,
            tokenizer,
            manifest,
            rows,
            Judge(rows),
            sample=sample,
            seed=1,
            max_length=max_length,
            max_new_tokens=1,
        )
        return sum(share.total for share in found.values())

    assert total(5, None) == 5
    # "Where do I buy hats?" and the like, with their responses, are longer than 50 tokens.
    lengths = [sum(len(turn.content) for turn in row.messages) + 5 for row in rows]
    assert total(1000, 50) == sum(length <= 50 for length in lengths) > 0
    with pytest.raises(ConfigError, match="no rows"):
        total(1000, 10)


def test_flips_are_counted_by_what_was_forced() -> None:
    forced = [ANSWER, ANSWER, "a", "a", "a", "b"]
    judged = [ANSWER, "a", "a", "b", ANSWER, "b"]

    assert count_flips(forced, judged, ["a", "b", "c"]) == {
        "flip_to_respond": Share(1, 2),
        "flip_to_refuse/a": Share(1, 3),
        "flip_to_refuse/b": Share(1, 1),
        "flip_to_refuse/c": Share(0, 0),
    }
