import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from models.checkpoint import (
    PUBLISHED_REFUSALS,
    PUBLISHED_RESPOND,
    adopt,
    load_checkpoint,
    load_tokenizer,
    opening_ids,
    resolve_checkpoint,
    turn_opening_ids,
)
from models.errors import CheckpointError
from models.manifest import MANIFEST_NAME, load_manifest
from tests.toy import TEMPLATE, byte_tokenizer, save_toy, tiny_model

ROOT = Path(__file__).parents[2]

TRIMMING = TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
NO_GENERATION_PROMPT = TEMPLATE.partition("{% if add_generation_prompt %}")[0]
ENDS_LATER = TEMPLATE.replace(
    "{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<|assistant|>\n"
)
ENDS_EARLIER = TEMPLATE.replace("<|{{ m.role }}|>", "<|{{ m.role }}|>\n")


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    save_toy(directory)
    return directory


@pytest.fixture
def toy(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "toy"))


def message_of(function: Callable[..., Any], *arguments: Any) -> str:
    """Returns the one line that a checkpoint is refused with."""
    with pytest.raises(CheckpointError) as caught:
        function(*arguments)
    assert "\n" not in caught.value.message
    return caught.value.message


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_toy_checkpoint_loads(toy: Path) -> None:
    manifest, tokenizer = load_checkpoint(toy)
    assert manifest == load_manifest(toy)
    ids = tokenizer.convert_tokens_to_ids([t.token for t in manifest.control_tokens])
    assert ids == manifest.control_ids


def test_missing_manifest_names_the_file(toy: Path) -> None:
    (toy / MANIFEST_NAME).unlink()
    assert str(toy / MANIFEST_NAME) in message_of(load_checkpoint, toy)


def test_other_id_than_the_tokenizers_names_token_and_both_ids(toy: Path) -> None:
    actual = load_manifest(toy).respond.id
    rewrite(toy / MANIFEST_NAME, lambda m: m["respond"].update(id=3))
    message = message_of(load_checkpoint, toy)
    assert str(toy) in message
    assert f"'[respond]' is id {actual} in the tokenizer and id 3 in rheostat.json" in message


def test_token_of_several_ids_is_named(toy: Path) -> None:
    rewrite(toy / MANIFEST_NAME, lambda m: m["categories"][1].update(token="ab"))
    message = message_of(load_checkpoint, toy)
    assert str(toy) in message
    assert "'ab' is 2 ids" in message


def test_prefix_of_a_refusal_is_text(toy: Path) -> None:
    rewrite(toy / MANIFEST_NAME, lambda m: m.update(kept=False))
    rewrite(toy / MANIFEST_NAME, lambda m: m["categories"][1].update(refusal_prefix="Sorry,"))
    manifest, _ = load_checkpoint(toy)
    assert manifest.categories[1].refusal_prefix == "Sorry,"
    rewrite(toy / MANIFEST_NAME, lambda m: m["categories"][1].update(refusal_prefix="a[respond]"))
    assert "spells a special token" in message_of(load_checkpoint, toy)


@pytest.mark.parametrize("nested", [False, True])
def test_id_beyond_the_embedding_names_token_and_size(toy: Path, nested: bool) -> None:
    last = load_manifest(toy).respond.id
    config = {"model_type": "llama", "vocab_size": last}
    text = json.dumps({"text_config": config} if nested else config)
    (toy / "config.json").write_text(text)
    message = message_of(load_checkpoint, toy)
    assert f"'[respond]' has id {last}, beyond the model's vocabulary of {last}" in message


@pytest.mark.parametrize(
    "text", ["{nope", "", "[]", "5", "{}", '{"text_config": null}', '{"text_config": 5}', "\xff"]
)
def test_broken_config_is_named(toy: Path, text: str) -> None:
    (toy / "config.json").write_bytes(text.encode("latin-1"))
    assert str(toy / "config.json") in message_of(load_checkpoint, toy)


def test_missing_config_is_named(toy: Path) -> None:
    (toy / "config.json").unlink()
    assert str(toy / "config.json") in message_of(load_checkpoint, toy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{nope", "", "[]", "5"])
def test_broken_tokenizer_is_one_error(toy: Path, name: str, text: str) -> None:
    (toy / name).write_text(text)
    assert message_of(load_checkpoint, toy).startswith(f"{toy}: the tokenizer cannot be loaded: ")


def test_inconsistent_tokenizer_is_one_error(toy: Path) -> None:
    rewrite(toy / "tokenizer.json", lambda t: t["model"].update(type="NoSuchModel"))
    assert message_of(load_checkpoint, toy).startswith(f"{toy}: the tokenizer cannot be loaded: ")


def test_template_that_trims_is_right_for_tokens_without_a_leading_space(toy: Path) -> None:
    (toy / "chat_template.jinja").write_text(TRIMMING)
    load_checkpoint(toy)


@pytest.mark.parametrize("template", [NO_GENERATION_PROMPT, ENDS_LATER, ENDS_EARLIER])
def test_template_that_ends_elsewhere_is_one_error(toy: Path, template: str) -> None:
    (toy / "chat_template.jinja").write_text(template)
    message = message_of(load_checkpoint, toy)
    assert f"{toy}: the chat template does not end where the decision step begins" in message
    assert "'[refuse:safety]'" in message


DROPS_EARLIER = TEMPLATE.replace(
    "{{ m.content }}", "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
)
PRINTS_TWICE = TEMPLATE.replace(
    "{{ m.content }}",
    "{{ m.content }}{% if not loop.last and m.role == 'assistant' %}{{ m.content }}{% endif %}",
)


# As in Mistral's templates: the answer stands right behind the question's end.
NO_OPENING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|assistant|>"
    "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
)


def test_template_without_a_generation_prompt_opens_with_the_questions_end(toy: Path) -> None:
    (toy / "chat_template.jinja").write_text(NO_OPENING)
    _, tokenizer = load_checkpoint(toy)
    opened: Any = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|user|>"])
    assert opening_ids(tokenizer) == opened[:1]
    assert turn_opening_ids(tokenizer) == {*opened}


@pytest.mark.parametrize("template", [DROPS_EARLIER, PRINTS_TWICE])
def test_template_that_drops_or_repeats_an_earlier_turn_is_one_error(
    toy: Path, template: str
) -> None:
    assert template != TEMPLATE
    (toy / "chat_template.jinja").write_text(template)
    assert "does not print an earlier assistant turn exactly once" in message_of(
        load_checkpoint, toy
    )


@pytest.mark.parametrize("template", ["{% for %}", "{{ 5 + 'a' }}", "{{ messages[9].x.y }}"])
def test_template_that_fails_is_one_error(toy: Path, template: str) -> None:
    (toy / "chat_template.jinja").write_text(template)
    assert message_of(load_checkpoint, toy).startswith(f"{toy}: the chat template fails: ")


def test_missing_template_is_one_error(toy: Path) -> None:
    (toy / "chat_template.jinja").unlink()
    assert message_of(load_checkpoint, toy) == f"{toy}: the tokenizer has no chat template"


def save_published(directory: Path, template: str | None, tokens: list[str]) -> None:
    """Writes a checkpoint as its authors did: the tokens are ordinary added ones."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    tokenizer.chat_template = template
    tiny_model(len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


PUBLISHED = [*PUBLISHED_REFUSALS, PUBLISHED_RESPOND]


@pytest.fixture(scope="session")
def published_trimming(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("published-trimming")
    save_published(directory, TRIMMING, PUBLISHED)
    return directory


def test_adopt_writes_a_manifest_that_loads(tmp_path: Path) -> None:
    save_published(tmp_path, TEMPLATE, PUBLISHED)
    manifest = adopt(tmp_path)
    loaded, tokenizer = load_checkpoint(tmp_path)
    assert loaded == manifest
    assert manifest.names == [
        "humanizing",
        "incomplete",
        "indeterminate",
        "safety",
        "unsupported",
        "refuse",
    ]
    assert manifest.respond.token == " [respond]"
    assert tokenizer.encode(" [refuse]", add_special_tokens=False) == [manifest.categories[-1].id]
    assert manifest.recipe is None


def test_adopt_takes_the_single_token_checkpoint(tmp_path: Path) -> None:
    save_published(tmp_path, TEMPLATE, [" [refuse]", " [respond]"])
    assert adopt(tmp_path).names == ["refuse"]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_adopt_refuses_a_template_that_trims_and_writes_nothing(published_trimming: Path) -> None:
    before = files_of(published_trimming)
    message = message_of(adopt, published_trimming)
    assert "does not start with ' [Humanizing requests]'" in message
    assert files_of(published_trimming) == before


def test_adopt_with_a_right_template_saves_it(published_trimming: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(published_trimming, tmp_path / "checkpoint"))
    template = tmp_path / "right.jinja"
    template.write_text(TEMPLATE + "{# é #}", encoding="utf-8")
    adopt(directory, template)
    assert (directory / "chat_template.jinja").read_bytes() == template.read_bytes()
    load_checkpoint(directory)


@pytest.mark.parametrize("text", [NO_GENERATION_PROMPT, "{% for %}", "", "\xff"])
def test_adopt_with_a_wrong_template_writes_nothing(
    published_trimming: Path, tmp_path: Path, text: str
) -> None:
    before = files_of(published_trimming)
    template = tmp_path / "wrong.jinja"
    template.write_bytes(text.encode("latin-1"))
    message_of(adopt, published_trimming, template)
    assert files_of(published_trimming) == before


@pytest.mark.parametrize("tokens", [[], [" [respond]"], [" [refuse]"], ["[respond]", "[refuse]"]])
def test_adopt_without_the_published_tokens_says_which_it_wants(
    tmp_path: Path, tokens: list[str]
) -> None:
    save_published(tmp_path, TEMPLATE, tokens)
    message = message_of(adopt, tmp_path)
    assert "' [respond]'" in message
    assert "' [Requests with safety concerns]'" in message
    assert not (tmp_path / MANIFEST_NAME).exists()


def test_adopt_refuses_a_model_that_was_not_resized(
    published_trimming: Path, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(published_trimming, tmp_path / "checkpoint"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    rewrite(directory / "config.json", lambda c: c.update(vocab_size=261))
    assert "beyond the model's vocabulary of 261" in message_of(adopt, directory)
    assert not (directory / MANIFEST_NAME).exists()


def test_tokenizer_of_an_empty_folder_is_one_error(tmp_path: Path) -> None:
    assert str(tmp_path) in message_of(load_tokenizer, tmp_path)


def test_folder_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


def test_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    told = message_of(lambda folder: resolve_checkpoint(str(folder), "main"), tmp_path)

    assert told == f"{tmp_path}: is a folder, and revision 'main' is for the hub"


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no/such/folder", "/no/such/folder"])
def test_name_that_is_nowhere_is_one_error(tmp_path: Path, name: str) -> None:
    program = (
        "import sys\n"
        "from models.checkpoint import resolve_checkpoint\n"
        "from models.errors import CheckpointError\n"
        "try:\n"
        "    resolve_checkpoint(sys.argv[1])\n"
        "except CheckpointError as error:\n"
        "    print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"{name!r} is neither a folder nor a model on the hub: ")
    assert done.stdout.count("\n") == 1
