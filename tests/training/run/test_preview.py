import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from models.errors import CheckpointError, ConfigError
from models.tokens import add_control_tokens
from tests.training.conftest import Rows, WriteRows, small_rows
from tests.training.recipes import MODEL
from training.config.recipe import OptimisationConfig, TrainConfig
from training.data.encoding import Example
from training.model.scratch import train_tokenizer
from training.model.start import start_of
from training.run.estimate import work
from training.run.preview import dry_run, rendered


def _values(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "model": MODEL,
        "data": {"train": [str(path)]},
        "categories": {"safety": "harms", "humanizing": "takes it for a person"},
        "optimisation": {"epochs": 3, "batch_size": 8, "max_length": 64},
        **changes,
    }


def _shown(values: dict[str, Any], *, colour: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=100, force_terminal=colour, color_system="standard" if colour else None
    )
    dry_run(TrainConfig.model_validate(values), console)
    return file.getvalue()


def _rows() -> Rows:
    rows = small_rows()
    return [
        *rows,
        {**rows[2], "near_miss": "safety", "prompt": "Where do I steal a look?"},
        {**rows[0], "prompt": "Both", "pair": "p"},
        {**rows[2], "prompt": "Both", "pair": "p"},
        {**rows[0], "prompt": "Nothing but the token", "response": None},
        {**rows[0], "prompt": "DO YOU love hats?"},
    ]


def _cells(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


def _counts(text: str) -> dict[str, int]:
    table = text.partition("Duplicates")[0]
    rows = [line.strip("│").split("│") for line in table.splitlines() if line.startswith("│")]
    return {cells[2].strip(): int(cells[3]) for cells in rows if cells[3].strip()}


def test_dry_run_shows_what_will_be_learnt(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_rows(_rows())
    before = sorted(tmp_path.iterdir())

    text = _shown(_values(path))

    # 8 of 32 rows are of each category, and 16 answers; then come the five rows of _rows().
    assert _counts(text) == {"humanizing": 8, "safety": 11, "respond": 18, "all": 37}
    assert "Duplicates: none" in text
    assert "Prompts with conflicting labels: 1, among them" in text
    assert f"{path}:30 says humanizing, {path}:37 says safety: 'DO YOU love hats?'" in text
    assert "Near misses: safety 1" in text
    assert "Counterfactual pairs: 1" in text
    assert "Without a response (control token only): 1" in text
    # Nothing of a pair's decision is learnt, and nothing but the decision without a response.
    assert "Both<|end|><|assistant|>[refuse:safety]«" in text
    assert "the token<|end|><|assistant|>«[refuse:safety]»" in text
    assert "<|assistant|>«[respond]" in text
    assert "near miss of safety" in text
    assert "15 in 3 epochs" in text
    assert "measured: " in text
    assert sorted(tmp_path.iterdir()) == before


def test_lengths_are_those_of_the_rows(write_rows: WriteRows) -> None:
    path = write_rows([*small_rows(), {**small_rows()[0], "response": "steal " * 60}])

    text = _shown(_values(path, data={"train": [str(path)], "too_long": "drop"}))

    assert int(_cells(text, "all")[5]) > 64
    # One of nine.
    assert _cells(text, "safety")[6] == "11.1%"
    assert _cells(text, "respond")[6] == "0.0%"
    assert "too long: 1 rows" in text
    assert "12 in 3 epochs" in text


def test_learnt_text_is_marked_and_coloured(write_rows: WriteRows) -> None:
    tokenizer = train_tokenizer(["ab c"], 300, 64)
    manifest = add_control_tokens(tokenizer, {"safety": "harms"})
    ids = tokenizer.encode("<|user|>ab<|assistant|>[refuse:safety]c\n<|end|>\x1b[2J")
    learnt = len(ids) - len(tokenizer.encode("\x1b[2J"))
    start = ids.index(manifest.control_ids[0])
    weights = [5.0 if start <= at < learnt else 0.0 for at in range(len(ids))]

    text = rendered(Example(ids, weights), tokenizer, manifest)

    assert text.plain == "<|user|>ab<|assistant|>«[refuse:safety]c⏎<|end|>»�[2J"
    (control,) = [span for span in text.spans if "reverse" in str(span.style)]
    assert text.plain[control.start : control.end] == "[refuse:safety]"


@pytest.fixture
def out_of_reach(write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe whose model the hub does not give, so that only the counts are shown."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return _values(write_rows(small_rows()), model={"checkpoint": "no-one/no-model"})


def test_colours_appear_on_a_terminal_only(out_of_reach: dict[str, Any]) -> None:
    assert "\x1b[" in _shown(out_of_reach, colour=True)
    assert "\x1b[" not in _shown(out_of_reach)


def test_model_path_that_is_not_there_is_an_error(write_rows: WriteRows, tmp_path: Path) -> None:
    missing = tmp_path / "base"

    with pytest.raises(CheckpointError, match=str(missing)):
        _shown(_values(write_rows(small_rows()), model={"checkpoint": str(missing)}))


def test_training_rows_among_those_measured_on_are_told(
    out_of_reach: dict[str, Any], tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    rows = [small_rows()[0], {**small_rows()[0], "prompt": "A new one"}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    text = _shown({**out_of_reach, "evaluation": {"data": [str(held_out)], "best": "loss"}})

    assert "Measured on the way: 2 rows (safety 2)" in text
    assert "1 of these prompts are also trained on" in text


def _held_out(folder: Path, category: str | None, **changes: Any) -> dict[str, Any]:
    path = folder / "held_out.jsonl"
    rows = [row for row in small_rows() if row["category"] == category]
    path.write_text("".join(json.dumps({**row, **changes}) + "\n" for row in rows))
    return {"data": [str(path)]}


@pytest.mark.parametrize(
    ("category", "lacking", "best"),
    [("safety", "to be answered", "auc"), (None, "to be refused", "refused_at_5")],
)
def test_metric_that_the_held_out_rows_cannot_tell_ends_the_dry_run(
    out_of_reach: dict[str, Any], tmp_path: Path, category: str | None, lacking: str, best: str
) -> None:
    evaluation = {**_held_out(tmp_path, category), "best": best}

    with pytest.raises(ConfigError) as raised:
        _shown({**out_of_reach, "evaluation": evaluation})

    assert raised.value.message.startswith(f"evaluation.best: {best} cannot be told from")
    assert f"none is {lacking}; add such rows, or set evaluation.best to last" in (
        raised.value.message
    )


def test_metric_that_rows_of_one_kind_can_tell_is_taken(
    out_of_reach: dict[str, Any], tmp_path: Path
) -> None:
    evaluation = {**_held_out(tmp_path, "safety"), "best": "loss"}

    text = _shown({**out_of_reach, "evaluation": evaluation})

    assert "Measured on the way: 8 rows (safety 8)" in text
    assert "  No row at all: humanizing, respond" in text


def test_held_out_rows_are_encoded_as_in_the_training(
    write_rows: WriteRows, tmp_path: Path
) -> None:
    values = _values(write_rows(small_rows()))
    typed = {**_held_out(tmp_path, None, prompt="Say [respond]"), "best": "last"}

    with pytest.raises(ConfigError, match=r"held_out\.jsonl:1: the text holds the control token"):
        _shown({**values, "evaluation": typed})


def test_held_out_rows_that_are_too_long_are_told(write_rows: WriteRows, tmp_path: Path) -> None:
    values = _values(write_rows(small_rows()))
    values["data"]["too_long"] = "drop"
    long = {**_held_out(tmp_path, None, response="steal " * 60), "best": "last"}
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps(small_rows()[2]) + "\n")
    mixed = {"data": [*long["data"], str(answers)], "best": "last"}

    with pytest.raises(ConfigError, match="no rows to measure on: all 16 are too long"):
        _shown({**values, "evaluation": long})
    assert "Not measured, because they are too long: 16 rows" in _shown(
        {**values, "evaluation": mixed}
    )


def _many(write_rows: WriteRows, times: int) -> Path:
    return write_rows(
        [
            {**row, "prompt": f"{number}: {row['prompt']}"}
            for number in range(times)
            for row in small_rows()
        ]
    )


def test_search_for_the_loss_is_told_with_what_it_takes(
    out_of_reach: dict[str, Any], write_rows: WriteRows
) -> None:
    auto = {**out_of_reach, "loss": {"decision": {"q": "auto"}}}
    auto["data"] = {"train": [str(_many(write_rows, 7))]}

    text = _shown(auto)

    # 224 rows, a fifth of each category set aside: 12 of 56, 12 of 56 and 23 of 112.
    assert "auto: q and gamma are chosen on 177 training rows and 47 others of them" in text
    assert "1.4 to 1.7 times the steps" in text
    assert "auto" not in _shown(out_of_reach)


def test_rows_too_few_for_auto_end_the_dry_run(out_of_reach: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"loss\.decision: auto compares"):
        _shown({**out_of_reach, "loss": {"decision": {"q": "auto"}}})


def test_recipe_that_measures_nothing_says_which_weights_are_kept(
    out_of_reach: dict[str, Any],
) -> None:
    assert "Measured on the way: nothing, so the last weights are kept" in _shown(out_of_reach)


def test_category_without_rows_and_rows_left_out_are_told(
    out_of_reach: dict[str, Any], write_rows: WriteRows
) -> None:
    rows = [row for row in small_rows() if row["category"] != "humanizing"]
    path = write_rows([*rows, {"prompt": "a"}])
    data = {"train": [{"path": str(path), "bad_rows": "drop"}]}

    text = _shown({**out_of_reach, "data": data})

    assert "No row at all: humanizing" in text
    assert "1 bad rows" in text
    assert f"{path.name}:25: category: is missing" in "".join(text.split("\n"))


def test_single_token_counts_one_category(out_of_reach: dict[str, Any]) -> None:
    text = _shown({**out_of_reach, "single_token": True})

    assert _counts(text) == {"refuse": 16, "respond": 16, "all": 32}


def _checkpoint(config: TrainConfig, folder: Path) -> Path:
    from training.data.mixture import gather

    start = start_of(config, gather(config.data, list(config.categories)).rows)
    start.tokenizer.save_pretrained(folder)
    start.make().save_pretrained(folder)
    return folder


def test_existing_model_is_measured_where_it_lies_here(
    write_rows: WriteRows, tmp_path: Path
) -> None:
    values = _values(write_rows(small_rows()))
    folder = _checkpoint(TrainConfig.model_validate(values), tmp_path / "base")

    text = _shown({**values, "model": {"checkpoint": str(folder)}})

    assert "measured: " in text
    assert "12 in 3 epochs" in text


def _out_of_memory(*_values: Any, **_options: Any) -> None:
    raise MemoryError


def test_model_that_is_too_large_for_this_machine_has_no_time(
    write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.run.trainer.ControlTokenTrainer.compute_loss", _out_of_memory)
    text = _shown(_values(write_rows(small_rows())))

    assert "12 in 3 epochs" in text
    assert "time of" not in text
    assert "Time is not shown: out of memory: lower optimisation.batch_size" in text


def test_model_whose_weights_are_elsewhere_has_no_time(
    write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = _values(write_rows(small_rows()))
    folder = _checkpoint(TrainConfig.model_validate(values), tmp_path / "base")
    hub = {**values, "model": {"checkpoint": "some/model"}}
    monkeypatch.setattr("training.run.preview._fetched", lambda model: folder)

    assert "time of the steps" in _shown(hub)
    with monkeypatch.context() as patched:
        patched.setattr("transformers.AutoModelForCausalLM.from_pretrained", _out_of_memory)
        text = _shown({**values, "model": {"checkpoint": str(folder)}})
    assert "Time is not shown: model: its weights do not fit" in text
    (folder / "model.safetensors").unlink()
    text = _shown(hub)
    assert "12 in 3 epochs" in text
    assert "Time is not shown: the model's weights are not on this machine" in text


def test_time_of_the_measurements_is_told(write_rows: WriteRows, tmp_path: Path) -> None:
    evaluation = {**_held_out(tmp_path, "safety"), "best": "last", "every": 0.25}
    values = {**_values(write_rows(small_rows())), "evaluation": evaluation}

    # 12 steps: before the first, after every third, and of what is exported.
    assert "(6 of 0 s each)" in _shown(values)
    assert "(5 of 0 s each)" in _shown({**values, "evaluation": {**evaluation, "at_start": False}})


def test_work_counts_tokens_and_steps() -> None:
    examples = [Example([1] * 100, [0.0] * 60 + [1.0] * 40)] * 50
    optimisation = OptimisationConfig(epochs=2, batch_size=4, gradient_accumulation_steps=2)

    # 50 rows in batches of 8 are 7 steps an epoch.
    assert work(examples, optimisation) == (5000, 2000, 50, 14)
