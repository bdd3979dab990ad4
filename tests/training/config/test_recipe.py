from pathlib import Path

import pytest

from models.errors import ConfigError
from models.tokens import COCONOT_DESCRIPTIONS
from training.config.data import Source
from training.config.recipe import CheckpointModel, ScratchModel, TrainConfig, load_config

RECIPE = """
name: small
model: {vocab_size: 400, hidden_size: 64, layers: 2, heads: 2, intermediate_size: 128}
data: {train: [rows.jsonl]}
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def _complaints(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(_write(folder, text))
    return caught.value.message.splitlines()


def test_recipe_from_file_is_read_with_defaults(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, RECIPE))

    assert isinstance(config.model, ScratchModel)
    assert config.data.train == (Source(path="rows.jsonl"),)
    assert list(config.categories) == list(COCONOT_DESCRIPTIONS)


def test_recipe_of_the_package_is_found_by_its_bare_name() -> None:
    config = load_config("demo")

    assert config.name == "demo"
    assert config.data.train == "demo"


def test_model_with_checkpoint_key_is_an_existing_one(tmp_path: Path) -> None:
    text = "name: a\nmodel: {checkpoint: some/model}\ndata: {train: demo}\n"

    model = load_config(_write(tmp_path, text)).model

    assert model == CheckpointModel(checkpoint="some/model")


def test_each_wrong_field_is_one_line_with_its_path(tmp_path: Path) -> None:
    text = RECIPE + "seed: -1\noptimisation: {epochs: none, batchsize: 3}\n"

    lines = _complaints(tmp_path, text)

    path = tmp_path / "recipe.yaml"
    assert len(lines) == 3
    assert f"{path}: seed: input should be greater than or equal to 0, got -1" in lines
    assert any(line.startswith(f"{path}: optimisation.epochs: ") for line in lines)
    assert (
        f"{path}: optimisation.batchsize: no such field; check the spelling or take it out" in lines
    )


def test_wrong_field_of_the_model_names_no_internal_tag(tmp_path: Path) -> None:
    lines = _complaints(tmp_path, RECIPE.replace("layers: 2", "layers: 0"))

    assert len(lines) == 1
    assert ": model.layers: " in lines[0]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("heads: 2", "heads: 4", "model: hidden_size / heads must be 32, 64 or 128, got 64 / 4"),
        ("vocab_size: 400", "vocab_size: 10000000000", "model.vocab_size: input should be less"),
        ("[rows.jsonl]", "rows.jsonl", "data.train: must be a list of sources, or the word demo"),
        ("[rows.jsonl]", "[1]", "data.train: must be a list of sources, or the word demo"),
        ("rows.jsonl", '"rows\\0.jsonl"', "data.train.0.path: must hold no NUL character, got 'r"),
        ("", "optimisation: {max_length: 1000}", "optimisation.max_length is 1000, more than"),
        ("", "refusal_texts: {medical: See a doctor.}", "refusal_texts names 'medical', which is"),
        ("", "refusal_prefixes: {medical: See}", "refusal_prefixes names 'medical', which is"),
        ("", "refusal_prefixes: {safety: Sorry}", "refusal_prefixes are for train: tokens"),
        ("", "categories: {Not Good: bad}", "categories.Not Good: string should match"),
        ("", "categories: {answer: bad}", "categories: answer is what the answers are called"),
        ("", "seed: 4294967296", "seed: input should be less than 4294967296"),
        ("", "optimisation: {epochs: .inf}", "optimisation.epochs: input should be a finite"),
        ("", "loss: {decision: {q: .nan}}", "loss.decision.q: input should be"),
        ("", "loss: {decision: {gamma: {safety: .inf}}}", "loss.decision.gamma.safety: input"),
        ("", "loss: {text: {q: {start: .nan, end: 1}}}", "loss.text.q.start: input should be"),
        ("", "lora: {target_modules: []}", "lora.target_modules"),
        ("", "lora: {r: 8}", "lora adapts an existing model: give model.checkpoint"),
        ("", "optimisation: {gradient_accumulation_steps: 1000000}", "optimisation.gradient_accu"),
        ("", "evaluation: {data: [{path: a, weight: 1.0e+9}]}", "evaluation.data.0.weight"),
    ],
)
def test_wrong_recipe_is_one_line(tmp_path: Path, old: str, new: str, line: str) -> None:
    text = RECIPE.replace(old, new) if old else f"{RECIPE}{new}\n"

    told = _complaints(tmp_path, text)

    assert all(one.startswith(f"{tmp_path / 'recipe.yaml'}: {line}") for one in told), told


def test_refusal_text_is_the_recipes_own_before_the_default() -> None:
    config = TrainConfig.model_validate(
        {
            "name": "a",
            "model": {"checkpoint": "b"},
            "data": {"train": "demo"},
            "categories": {"safety": "harms", "legal": "law"},
            "refusal_texts": {"legal": "Ask a lawyer."},
        }
    )

    assert config.refusal_text("legal") == "Ask a lawyer."
    assert "harm" in config.refusal_text("safety")


def test_missing_recipe_lists_those_of_the_package() -> None:
    with pytest.raises(ConfigError, match=r"no_such\.yaml.*demo"):
        load_config("no_such.yaml")


def test_duplicate_field_is_rejected(tmp_path: Path) -> None:
    (line,) = _complaints(tmp_path, RECIPE + "optimisation: {epochs: 1, epochs: 2}\n")

    assert "duplicate field 'epochs'" in line


def test_merged_field_may_be_overwritten(tmp_path: Path) -> None:
    text = "optimisation: &o {epochs: 2}\nevaluation: {data: demo, rows: 3}\n"
    assert load_config(_write(tmp_path, RECIPE + text)).optimisation.epochs == 2
    merged = "data: {train: [{<<: &s {path: a.csv, weight: 2}, weight: 3}, {<<: *s}]}\n"
    recipe = RECIPE.replace("data: {train: [rows.jsonl]}\n", merged)

    train = load_config(_write(tmp_path, recipe)).data.train

    assert not isinstance(train, str)
    assert [source.weight for source in train] == [3, 2]


@pytest.mark.parametrize(
    "value", ["x" * 10_000, "1" * 2_000, "[" + "a," * 10_000 + "]", "&l [*l, *l, *l]"]
)
def test_wrong_value_is_told_in_brief(tmp_path: Path, value: str) -> None:
    (line,) = _complaints(tmp_path, f"{RECIPE}report_to: {{a: {value}}}\n")

    assert len(line.removeprefix(str(tmp_path))) < 300


@pytest.mark.parametrize("text", ["", "- a\n", "a: [\n", "[" * 3000], ids=range(4))
def test_file_that_is_no_mapping_is_one_line(tmp_path: Path, text: str) -> None:
    assert len(_complaints(tmp_path, text)) == 1


def test_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_config("demo")

    again = load_config(_write(tmp_path, config.to_yaml()))

    assert again == config
    assert again.sha256() == config.sha256()


def test_recipe_without_prefixes_has_the_hash_of_before_there_were_any() -> None:
    config = load_config("demo")

    assert "refusal_prefixes" not in config.to_yaml()
    prefixed = config.model_copy(update={"refusal_prefixes": {"safety": "Sorry,"}})
    assert prefixed.sha256() != config.sha256()


def test_hash_changes_with_any_field() -> None:
    config = load_config("demo")

    assert config.model_copy(update={"seed": 1}).sha256() != config.sha256()
