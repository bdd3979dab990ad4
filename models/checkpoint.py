"""Loads a checkpoint folder and validates its contract."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import CheckpointError
from models.manifest import Category, ControlToken, Manifest, load_manifest, save_manifest
from models.tokens import COCONOT_DESCRIPTIONS, single_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tokens of the authors' published Llama-3 checkpoints (arXiv 2412.06748). The leading space
# is part of each.
PUBLISHED_RESPOND = " [respond]"
PUBLISHED_REFUSALS = {
    " [Humanizing requests]": "humanizing",
    " [Incomplete requests]": "incomplete",
    " [Indeterminate requests]": "indeterminate",
    " [Requests with safety concerns]": "safety",
    " [Unsupported requests]": "unsupported",
    " [refuse]": "refuse",
}

WITHOUT_WEIGHTS = ("*.json", "*.jinja", "*.model", "*.txt")


def resolve_checkpoint(
    model: str, revision: str | None = None, *, with_weights: bool = True
) -> Path:
    """Returns the local folder of a checkpoint; a name on the hub is fetched.

    Args:
        model: A folder, or a repository's name on the model hub.
        revision: Branch, tag or commit on the hub.
        with_weights: Whether the weights are fetched too.

    Raises:
        CheckpointError: Neither a folder nor the hub has it; or it is a folder, and ``revision``
            is given.
    """
    if Path(model).is_dir():
        if revision is not None:
            raise CheckpointError(f"{model}: is a folder, and revision {revision!r} is for the hub")
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*WITHOUT_WEIGHTS, *(["*.safetensors"] if with_weights else [])],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is neither a folder nor a model on the hub: {_first_line(error)}"
        ) from error


def load_checkpoint(directory: Path) -> tuple[Manifest, "PreTrainedTokenizerBase"]:
    """Loads the manifest and the tokenizer, and validates each by the other.

    Raises:
        CheckpointError: A file is missing or broken; a control token is not one id, has not the
            manifest's id, or is outside the embedding; or the chat template does not end where the
            decision step begins, or drops earlier assistant turns.
    """
    manifest = load_manifest(directory)
    _check_embedding(directory, manifest)
    tokenizer = load_tokenizer(directory)
    _check_tokens(directory, manifest, tokenizer)
    for token in manifest.control_tokens:
        _check_template(directory, token, tokenizer)
    return manifest, tokenizer


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Loads a tokenizer from a local folder; fetches nothing and runs no code of the folder's.

    Raises:
        CheckpointError: The folder holds no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{directory}: the tokenizer cannot be loaded: {_first_line(error)}"
        ) from error


def opening_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns the ids that the chat template puts between a question and the decision step."""
    question = [{"role": "user", "content": "Hello"}]
    without, with_prompt = (
        str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=wanted))
        for wanted in (False, True)
    )
    # Without a generation prompt, the question's own end precedes the decision step.
    text = with_prompt.removeprefix(without) or with_prompt.rpartition("Hello")[2]
    opening: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return opening


def turn_opening_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Returns the special tokens with which the chat template opens a user's or assistant's turn.

    Tokens that also end a turn are left out: an answer may have to end with them.
    """
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Sure"}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    head, tail = rendered.partition("Hello")[0], rendered.rpartition("Sure")[2]
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    opens = {*tokenizer.encode(head, add_special_tokens=False), *opening_ids(tokenizer)}
    ends = {*tokenizer.encode(tail, add_special_tokens=False), tokenizer.eos_token_id}
    return frozenset((opens & special) - ends)


def adopt(directory: Path, chat_template: Path | None = None) -> Manifest:
    """Writes the manifest of a checkpoint whose authors gave it refusal tokens.

    Args:
        directory: The checkpoint's folder. Its tokenizer must hold the published respond token
            and at least one published refusal token.
        chat_template: A Jinja file that replaces its template; saved beside the weights.

    Raises:
        CheckpointError: The tokens are missing, or the manifest would break the contract. Nothing
            is written.
    """
    tokenizer = load_tokenizer(directory)
    known = tokenizer.get_vocab()
    refusals = [token for token in PUBLISHED_REFUSALS if token in known]
    if PUBLISHED_RESPOND not in known or not refusals:
        wanted = ", ".join(map(repr, [PUBLISHED_RESPOND, *PUBLISHED_REFUSALS]))
        raise CheckpointError(
            f"{directory}: the tokenizer does not hold the published control tokens; it needs "
            f"{PUBLISHED_RESPOND!r} and at least one refusal token out of {wanted}"
        )
    manifest = Manifest(
        respond=ControlToken(token=PUBLISHED_RESPOND, id=single_id(tokenizer, PUBLISHED_RESPOND)),
        categories=tuple(_published_category(tokenizer, token) for token in refusals),
    )
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    _check_embedding(directory, manifest)
    for token in manifest.control_tokens:
        _check_template(directory, token, tokenizer)
    if chat_template is not None:
        shutil.copyfile(chat_template, directory / "chat_template.jinja")
    save_manifest(directory, manifest)
    return manifest


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the chat template cannot be read: {error}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _published_category(tokenizer: "PreTrainedTokenizerBase", token: str) -> Category:
    name = PUBLISHED_REFUSALS[token]
    return Category(
        name=name,
        token=token,
        id=single_id(tokenizer, token),
        description=COCONOT_DESCRIPTIONS.get(name, "should not be answered"),
    )


def _check_tokens(
    directory: Path, manifest: Manifest, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    for category in manifest.categories:
        if category.refusal_prefix is not None:
            ids = {*tokenizer.encode(category.refusal_prefix, add_special_tokens=False)}
            if not ids.isdisjoint([*tokenizer.all_special_ids, *manifest.control_ids]):
                raise CheckpointError(
                    f"{directory}: {category.name}.refusal_prefix in rheostat.json spells a "
                    "special token"
                )
    for control in manifest.control_tokens:
        try:
            actual = single_id(tokenizer, control.token)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error.message}") from error
        if actual != control.id:
            raise CheckpointError(
                f"{directory}: the control token {control.token!r} is id {actual} in the tokenizer "
                f"and id {control.id} in rheostat.json; one of the two belongs to another model"
            )


def _check_embedding(directory: Path, manifest: Manifest) -> None:
    path = directory / "config.json"
    try:
        config: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    text_config = config.get("text_config") if isinstance(config, dict) else None
    sizes = [part.get("vocab_size") for part in (config, text_config) if isinstance(part, dict)]
    size = next((size for size in sizes if size), None)
    if not isinstance(size, int):
        raise CheckpointError(f"{path}: vocab_size is missing")
    for control in manifest.control_tokens:
        if control.id >= size:
            raise CheckpointError(
                f"{directory}: the control token {control.token!r} has id {control.id}, beyond the "
                f"model's vocabulary of {size}: the model was not resized with its tokenizer"
            )


def _check_template(
    directory: Path, control: ControlToken, tokenizer: "PreTrainedTokenizerBase"
) -> None:
    if not tokenizer.chat_template:
        raise CheckpointError(f"{directory}: the tokenizer has no chat template")
    question = [{"role": "user", "content": "Hello"}]
    turn = [*question, {"role": "assistant", "content": f"{control.token}Hello"}]
    try:
        prompt = str(
            tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        )
        whole = str(tokenizer.apply_chat_template(turn, tokenize=False))
        later = str(tokenizer.apply_chat_template([*turn, *question], tokenize=False))
    except Exception as error:  # A template is a program: it may fail in any way.
        raise CheckpointError(f"{directory}: the chat template fails: {error}") from error
    before: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    after: list[int] = tokenizer.encode(whole, add_special_tokens=False)
    if after[: len(before) + 1] != [*before, control.id]:
        raise CheckpointError(
            f"{directory}: the chat template does not end where the decision step begins: after "
            f"{prompt[-40:]!r} the assistant's turn does not start with {control.token!r}"
        )
    # The server rejects prompts whose earlier turns lost their control tokens.
    if tokenizer.encode(later, add_special_tokens=False).count(control.id) != 1:
        raise CheckpointError(
            f"{directory}: the chat template does not print an earlier assistant turn exactly "
            f"once: {control.token!r} is not once in a conversation that goes on after such a turn"
        )
