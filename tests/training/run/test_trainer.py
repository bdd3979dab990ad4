from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from trl.trainer.sft_config import SFTConfig

from models.errors import ConfigError
from models.manifest import Manifest
from models.tokens import add_control_tokens
from tests.toy import byte_tokenizer, tiny_model
from tests.training.data.test_batches import random_rows
from training.config.loss import LossConfig
from training.data.batches import (
    IGNORED,
    Collator,
    as_dataset,
)
from training.data.encoding import Example
from training.run.assembly import check_packing
from training.run.trainer import ControlTokenTrainer, Rhythm, Watch, token_log_probs


def _model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    build: Any = LlamaForCausalLM
    return build(config).eval()


def test_log_probs_are_those_of_the_full_softmax() -> None:
    model = _model()
    ids = torch.randint(0, 50, (3, 7))
    labels = ids.clone()
    labels[0, :4] = IGNORED
    labels[1, :2] = IGNORED
    labels[1, 5:] = IGNORED
    labels[2] = IGNORED

    found = token_log_probs(model, ids, labels)

    full = model(input_ids=ids).logits.log_softmax(-1)
    for row in range(3):
        for at in range(6):
            learnt = labels[row, at + 1] != IGNORED
            wanted = full[row, at, ids[row, at + 1]].item() if learnt else 0.0
            assert found[row, at].item() == pytest.approx(wanted, abs=1e-5)


def test_log_probs_of_a_batch_without_labels_are_zero_and_differentiable() -> None:
    model = _model()
    ids = torch.randint(0, 50, (2, 4))

    found = token_log_probs(model, ids, torch.full_like(ids, IGNORED))
    torch.autograd.backward(found.sum())

    assert not found.any()


def test_padding_on_the_right_changes_no_log_prob() -> None:
    model = _model()
    ids = torch.randint(1, 50, (1, 5))
    padded = torch.cat((ids, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    labels = torch.cat((ids, torch.full((1, 3), IGNORED)), dim=1)

    alone = token_log_probs(model, ids, ids)
    beside = token_log_probs(model, padded, labels)

    assert torch.allclose(alone, beside[:, :4], atol=1e-6)
    assert not beside[:, 4:].any()


def _losses_by_row(model: Any, dataset: Any, collator: Collator) -> list[list[float]]:
    batch = collator([dataset[at] for at in range(len(dataset))])
    found = token_log_probs(model, batch["input_ids"], batch["labels"], batch.get("position_ids"))
    losses = []
    for at, sequence in enumerate(dataset):
        starts = [place for place, position in enumerate(sequence["position_ids"]) if not position]
        for start, stop in zip(starts, [*starts[1:], sequence["length"]], strict=True):
            ids = sequence["input_ids"][start:stop]
            losses.append([*ids, *found[at, start : stop - 1].tolist()])
    return sorted(losses)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_packed_rows_have_the_losses_of_rows_alone(kind: str, attention: str) -> None:
    model = _model() if kind == "llama" else _qwen()
    model.set_attn_implementation(attention)
    examples = random_rows(20)

    alone = _losses_by_row(model, as_dataset(examples), Collator(0))
    packed = _losses_by_row(model, as_dataset(examples, 30), Collator(0, packed=True))

    assert [len(row) for row in alone] == [len(row) for row in packed]
    for one, other in zip(alone, packed, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    check_packing(model)


def test_model_that_lets_packed_rows_see_each_other_is_refused() -> None:
    model = _model()
    forward = model.forward

    def without_positions(**inputs: Any) -> Any:
        return forward(**{name: value for name, value in inputs.items() if name != "position_ids"})

    model.forward = without_positions

    with pytest.raises(ConfigError, match="see each other; set it to false"):
        check_packing(model)


def _qwen() -> Any:
    torch.manual_seed(0)
    build: Any = Qwen2ForCausalLM
    return build(
        Qwen2Config(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).eval()


# --- the trainer ----------------------------------------------------------------------------------


def _trained(
    folder: Path, examples: Sequence[Example], loss: LossConfig | None = None, **changes: Any
) -> ControlTokenTrainer:
    tokenizer = byte_tokenizer()
    manifest = add_control_tokens(tokenizer, {"safety": "harms"})
    options = {name: changes.pop(name) for name in ("fused", "rhythm") if name in changes}
    trainer = ControlTokenTrainer(
        loss=loss or LossConfig(),
        manifest=manifest,
        seed=0,
        watch=Watch(options.pop("rhythm", Rhythm(log=0.01))),
        model=tiny_model(len(tokenizer)),
        args=_arguments(folder, **changes),
        train_dataset=as_dataset(_with_decisions(examples, manifest)),
        data_collator=Collator(0),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    return trainer


def _with_decisions(examples: Sequence[Example], manifest: Manifest) -> list[Example]:
    ids = manifest.control_ids
    return [
        example._replace(input_ids=[*example.input_ids[:2], ids[at % 2], *example.input_ids[3:]])
        for at, example in enumerate(examples)
    ]


def _arguments(folder: Path, **changes: Any) -> SFTConfig:
    chosen = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return SFTConfig(
        output_dir=str(folder),
        **(chosen | changes),
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def _lines(trainer: ControlTokenTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def test_first_loss_is_the_weighted_mean_by_a_slow_reference(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    manifest = add_control_tokens(tokenizer, {"safety": "harms"})
    model: Any = tiny_model(len(tokenizer))
    model.eval()
    examples = random_rows(8)
    total = weight_sum = decision = 0.0
    for example in _with_decisions(examples, manifest):
        log_probs = model(input_ids=torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        for at in range(1, len(example.input_ids)):
            loss = -log_probs[at - 1, example.input_ids[at]].item()
            total += example.weights[at] * loss
            weight_sum += example.weights[at]
            decision += loss if at == 2 else 0.0

    line = _lines(_trained(tmp_path, examples, max_steps=1))[0]

    assert line["loss"] == pytest.approx(total / weight_sum, rel=1e-5)
    assert line["decision_loss"] == pytest.approx(decision / 8, rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        {"decision": {"q": 0.7, "gamma": 1.0}, "text": {"q": 0.2}},
        {"decision": {"q": {"start": 0.0, "end": 1.0}, "gamma": {"safety": 2.0}}},
    ],
)
def test_losses_do_not_depend_on_micro_batches_or_the_fused_head(
    tmp_path: Path, loss: dict[str, Any]
) -> None:
    examples = random_rows(30)
    chosen = LossConfig.model_validate(loss)
    whole = _lines(_trained(tmp_path, examples, chosen))
    split = _lines(
        _trained(
            tmp_path,
            examples,
            chosen,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
        )
    )
    fused = _lines(_trained(tmp_path, examples, chosen, fused=True))

    assert len(whole) == 6
    for other in (split, fused):
        for one, two in zip(whole, other, strict=True):
            for name in ("loss", "decision_loss", "text_loss", "grad_norm"):
                assert one[name] == pytest.approx(two[name], rel=2e-4), name


def test_schedule_follows_the_steps_of_the_whole_training(tmp_path: Path) -> None:
    examples = random_rows(8)
    scheduled = LossConfig.model_validate({"decision": {"q": {"start": 1.0, "end": 0.0}}})
    fixed = LossConfig.model_validate({"decision": {"q": 1.0}})

    line, at_end = (_lines(_trained(tmp_path, examples, loss)) for loss in (scheduled, fixed))

    assert line[0]["loss"] == pytest.approx(at_end[0]["loss"])
    assert line[-1]["loss"] > at_end[-1]["loss"] + 0.1


@pytest.mark.parametrize("option", ["bf16", "gradient_checkpointing"])
def test_cheaper_arithmetic_comes_to_about_the_same(tmp_path: Path, option: str) -> None:
    examples = random_rows(16)
    plain = _lines(_trained(tmp_path, examples))
    changes: dict[str, Any] = {option: True}
    cheaper = _lines(_trained(tmp_path, examples, **changes))

    tolerance = 0.02 if option == "bf16" else 1e-5
    assert cheaper[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=tolerance)


def test_batch_without_anything_to_learn_does_not_stop_the_training(tmp_path: Path) -> None:
    nothing = [Example([1, 2, 3, 4], [0.0] * 4)] * 8

    line = _lines(_trained(tmp_path, nothing, max_steps=1))[0]

    assert line["loss"] == 0.0
    assert "decision_loss" not in line
    assert "text_loss" not in line


def test_mean_loss_of_the_run_is_that_of_the_lines(tmp_path: Path) -> None:
    trainer = _trained(tmp_path, random_rows(24), rhythm=Rhythm(log=0.4))
    lines = _lines(trainer)

    assert [line["step"] for line in lines] == [3, 6]
    told = trainer.state.log_history[-1]["train_loss"]
    assert told == pytest.approx((lines[0]["loss"] + lines[1]["loss"]) / 2)
