import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.errors import ConfigError, EvaluationError
from models.manifest import Manifest
from models.tokens import add_control_tokens
from tests.toy import byte_tokenizer, tiny_model
from tests.training.conftest import Rows, read_rows, small_rows
from tests.training.killing import SPAWN
from training.data.rows import Row
from training.measure.monitor import DecisionMonitor, shared
from training.measure.sequences import LOGITS_AT_ONCE, Batch, TokenSequence, batches

NAMES = {"safety": "harms", "humanizing": "takes it for a person"}
ROOT = Path(__file__).parents[3]


def varied_rows() -> Rows:
    """Returns rows of different lengths, some without response, one of two assistant turns."""
    rows = small_rows()
    for number, row in enumerate(rows):
        row["prompt"] = f"{row['prompt']}{' Please!' * (number % 5)}"
        if number % 6 == 1:
            row["response"] = None
        if number % 4 == 3:
            row["near_miss"] = "humanizing"
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello.", "category": None},
        {"role": "user", "content": "Steal"},
        {"role": "assistant", "content": "No, never.", "category": "safety"},
    ]
    return [*rows, {"messages": talk}]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def manifest(tokenizer: PreTrainedTokenizerFast) -> Manifest:
    return add_control_tokens(tokenizer, NAMES)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast, manifest: Manifest) -> LlamaForCausalLM:
    del manifest  # it adds the control tokens that the model needs rows for
    return tiny_model(len(tokenizer))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in varied_rows()))
    return read_rows(path, NAMES)


Build = Any


@pytest.fixture
def build(rows: list[Row], tokenizer: PreTrainedTokenizerFast, manifest: Manifest) -> Build:
    def make(of: list[Row] | None = None, **options: Any) -> DecisionMonitor:
        chosen = rows if of is None else of
        return DecisionMonitor(chosen, tokenizer, manifest, **{"max_length": None, **options})

    return make


class Reference:
    """Each row alone, by a full forward pass."""

    def __init__(
        self, rows: list[Row], tokenizer: PreTrainedTokenizerFast, manifest: Manifest, model: Any
    ) -> None:
        self._tokenizer = tokenizer
        self._manifest = manifest
        self._model = model.eval()
        self.margins: list[list[float]] = []
        self.vocabulary_losses: list[float] = []
        self.text_losses: list[float] = []
        self.plain_text_losses: list[float] = []
        for row in rows:
            self._measure(row)

    def _measure(self, row: Row) -> None:
        ids = dict(zip([*self._manifest.names, None], self._manifest.control_ids, strict=True))
        prompt = self._encode(row.prompt)
        logits = self._logits(prompt)[-1]
        respond = logits[ids[None]]
        self.margins.append([(logits[ids[name]] - respond).item() for name in NAMES])
        self.vocabulary_losses.append(-logits.log_softmax(-1)[ids[row.category]].item())
        spoken: list[bool] = []
        whole: list[int] = []
        for turn in row.messages:
            if turn.role == "assistant":
                text = self._tokenizer.encode(turn.content + "<|end|>", add_special_tokens=False)
                if not turn.content:
                    text = []
                opening = self._tokenizer.encode("<|assistant|>", add_special_tokens=False)
                whole += [*opening, ids[turn.category], *text]
                spoken += [False, False, *[True] * len(text)]
            else:
                turn_ids = self._tokenizer.encode(
                    f"<|{turn.role}|>{turn.content}<|end|>", add_special_tokens=False
                )
                whole += turn_ids
                spoken += [False] * len(turn_ids)
        self.text_losses += self._losses(whole, spoken)
        kept = [at for at, token in enumerate(whole) if token not in ids.values()]
        self.plain_text_losses += self._losses([whole[i] for i in kept], [spoken[i] for i in kept])

    def _encode(self, turns: Any) -> list[int]:
        ids = dict(zip([*self._manifest.names, None], self._manifest.control_tokens, strict=True))
        chat = [
            {
                "role": t.role,
                "content": (ids[t.category].token if t.role == "assistant" else "") + t.content,
            }
            for t in turns
        ]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer.encode(str(text), add_special_tokens=False))

    def _logits(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self._model(input_ids=torch.tensor([ids])).logits[0]
        return logits

    def _losses(self, ids: list[int], spoken: list[bool]) -> list[float]:
        log_probs = self._logits(ids).log_softmax(-1)
        return [-log_probs[at - 1, ids[at]].item() for at in range(len(ids)) if spoken[at]]


@pytest.fixture(scope="module")
def reference(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerFast,
    manifest: Manifest,
    model: LlamaForCausalLM,
) -> Reference:
    return Reference(rows, tokenizer, manifest, model)


def test_margins_are_those_of_each_prompt_alone(
    build: Build, rows: list[Row], model: LlamaForCausalLM, reference: Reference
) -> None:
    found = build().measure(model)

    assert found.margins == pytest.approx(np.array(reference.margins), abs=1e-4)
    assert found.truth == tuple(row.category for row in rows)
    assert found.categories == ("safety", "humanizing")


def test_losses_are_those_of_each_row_alone(
    build: Build, model: LlamaForCausalLM, reference: Reference
) -> None:
    metrics = build().measure(model).metrics

    assert metrics["vocabulary_loss"] == pytest.approx(np.mean(reference.vocabulary_losses))
    assert metrics["text_loss"] == pytest.approx(np.mean(reference.text_losses))
    # The softmax of fewer tokens gives each of them more.
    assert metrics["loss"] < metrics["vocabulary_loss"]


def test_text_loss_without_control_tokens_is_that_of_the_plain_chat(
    build: Build, model: LlamaForCausalLM, reference: Reference
) -> None:
    found = build().text_loss(model, control_tokens=False)

    assert found == pytest.approx(np.mean(reference.plain_text_losses))
    assert found != pytest.approx(np.mean(reference.text_losses), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_padding_and_batches_change_nothing(
    build: Build, model: LlamaForCausalLM, batch_size: int
) -> None:
    whole = build(batch_size=64).measure(model)
    parts = build(batch_size=batch_size).measure(model)

    assert parts.margins == pytest.approx(whole.margins, abs=1e-4)
    assert parts.metrics == pytest.approx(whole.metrics, abs=1e-4)


def test_near_misses_and_metric_names_are_those_of_the_rows(
    build: Build, model: LlamaForCausalLM
) -> None:
    monitor = build()

    metrics = monitor.measure(model).metrics

    assert monitor.metric_names() == set(metrics)
    assert {"near_miss_refused/humanizing", "auc", "refused/safety"} <= set(metrics)
    assert "near_miss_refused/safety" not in metrics


def test_rows_without_responses_have_no_text_loss(
    build: Build, rows: list[Row], model: LlamaForCausalLM
) -> None:
    monitor = build([row for row in rows if row.response is None])

    assert "text_loss" not in monitor.measure(model).metrics
    assert monitor.text_loss(model) is None
    assert "text_loss" not in monitor.metric_names()


def test_text_loss_is_of_the_rows_drawn_once(
    build: Build, rows: list[Row], model: LlamaForCausalLM
) -> None:
    few = build(text_rows=3, seed=1)

    assert few.text_loss(model) == few.text_loss(model)
    assert few.text_loss(model) != build(text_rows=3, seed=2).text_loss(model)
    assert build(text_rows=0).text_loss(model) is None
    assert few.measure(model).margins.shape == (len(rows), 2)


def test_measuring_leaves_modes_gradients_and_random_states(
    build: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(len(tokenizer)).train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = (torch.get_rng_state(), str(np.random.get_state()), random.getstate())

    first = build().measure(model)
    again = build().measure(model)

    assert first.margins.tolist() == again.margins.tolist()
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state())
    assert before[2] == random.getstate()


def test_model_can_be_trained_after_it_was_measured_first(
    build: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(len(tokenizer)).train()
    build().measure(model)

    ids = torch.tensor([[1, 2, 3]])
    torch.autograd.backward(model(input_ids=ids, labels=ids).loss)

    assert model.get_input_embeddings().weight.grad is not None


def test_logits_are_made_for_few_places(build: Build, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model(len(tokenizer))
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape)))

    build(text_rows=0, batch_size=4).measure(model)

    # Rows are 20 to 60 tokens long; prompts of one batch end at most at four places.
    assert max(shape[1] for shape in shapes) <= 4


def test_broken_model_is_told_in_one_line(
    build: Build, rows: list[Row], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[:] = torch.nan

    with pytest.raises(EvaluationError, match=rf"{len(rows)} of {len(rows)} rows .* diverged"):
        build().measure(model)


def test_no_rows_are_an_error(build: Build) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        build([])


def test_rows_that_are_too_long_are_dropped_cut_or_told(
    build: Build, rows: list[Row], model: LlamaForCausalLM
) -> None:
    short = [row for row in rows if len(row.messages) > 2]

    dropped = build(max_length=40, too_long="drop").measure(model)

    assert len(short) <= len(dropped.truth) < len(rows)
    assert len(build(max_length=70, too_long="cut").measure(model).truth) == len(rows)
    with pytest.raises(ConfigError, match="more than 40 tokens"):
        build(max_length=40, too_long="error")


def _sequence(length: int, *positions: int) -> TokenSequence:
    return TokenSequence([1] * length, list(positions), [2] * len(positions))


def test_batches_hold_equal_lengths_and_index_what_is_asked() -> None:
    first, second = batches([_sequence(5, 3), _sequence(3, 1), _sequence(4, 1, 2)], 2, 10, 0)

    assert first.members == [1, 2]
    assert first.input_ids.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert first.kept.tolist() == [1, 2]
    assert (first.row.tolist(), first.column.tolist()) == ([0, 1, 1], [0, 0, 1])
    assert second.members == [0]


def test_batch_ends_before_its_logits_grow_too_large() -> None:
    sequences = [_sequence(4, 1, 2)] * 5

    # Two places each: room for two sequences, not for three.
    found = batches(sequences, 64, LOGITS_AT_ONCE // 5, 0)

    assert [batch.members for batch in found] == [[0, 1], [2, 3], [4]]
    assert [b.members for b in batches(sequences[:2], 64, LOGITS_AT_ONCE, 0)] == [[0], [1]]


def test_shared_work_of_one_process_is_in_order() -> None:
    work = batches([_sequence(length, 0) for length in (2, 3, 4)], 1, 10, 0)

    assert shared(work, lambda batch: batch.input_ids.shape[1], "lengths") == [2, 3, 4]
    assert shared([], lambda batch: batch.members, "nothing") == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for screen in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", screen)
        shared(batches([_sequence(2, 0)], 1, 10, 0), lambda batch: batch.members, "decisions")
        shown[screen.isatty()] = screen.getvalue()

    assert "measuring: decisions" in shown[True]
    assert shown[False] == ""


def _share(rank: int, meeting: str, told: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    calls: list[int] = []

    def do(batch: Batch) -> list[int]:
        calls.append(rank)
        return batch.members

    found = shared(batches([_sequence(length, 0) for length in (2, 3, 4)], 1, 10, 0), do, "rows")
    told.put((found, len(calls)))
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_batches_in_equally_many_passes(tmp_path: Path) -> None:
    told = SPAWN.Queue()
    processes = [
        SPAWN.Process(target=_share, args=(rank, str(tmp_path / "meeting"), told))
        for rank in range(2)
    ]
    for process in processes:
        process.start()

    # FSDP hangs where one process makes more forward passes than the other.
    assert [told.get(timeout=120) for _ in processes] == [([[0], [1], [2]], 2)] * 2
    for process in processes:
        process.join()
