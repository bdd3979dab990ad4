"""Fingerprints of a checkpoint: what a calibration is bound to."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from models.errors import CheckpointError

_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


class Hashes(BaseModel):
    """SHA-256 in hexadecimal of the three things that decide what a prompt's margins are.

    Attributes:
        weights: Of the names and contents of all safetensors files.
        template: Of the chat template's text.
        tokenizer: Of the tokenizer's files, without the chat template.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str
    template: str
    tokenizer: str


def checkpoint_hashes(directory: Path) -> Hashes:
    """Reads a checkpoint's folder and returns its hashes.

    A file that keeps its size and time of change is read once per process.

    Raises:
        CheckpointError: There are no weights, or a file cannot be read.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{directory} holds no weights: no *.safetensors file")
    tokenizer = [path for name in _TOKENIZER if (path := directory / name).is_file()]
    config = _tokenizer_config(directory)
    inner_template = config.pop("chat_template", None)
    try:
        return Hashes(
            weights=_of_files(weights),
            template=_of_template(directory, inner_template),
            tokenizer=_of_text(_of_files(tokenizer) + json.dumps(config, sort_keys=True)),
        )
    except OSError as error:
        raise CheckpointError(f"{directory}: a file cannot be read: {error}") from error


def _of_files(paths: list[Path]) -> str:
    # hashlib lets go of the interpreter: shards are read side by side.
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = list(pool.map(_of_file, paths))
    return _of_text("".join(f"{p.name}\n{d}\n" for p, d in zip(paths, digests, strict=True)))


def _of_file(path: Path) -> str:
    status = path.stat()
    return _read_once(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _read_once(path: Path, _size: int, _changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _of_template(directory: Path, inner: object) -> str:
    # As transformers reads it: the file wins over the field of the tokenizer's configuration.
    path = directory / _TEMPLATE
    text = path.read_bytes().decode(errors="surrogateescape") if path.is_file() else inner
    named = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    more = _of_files(named) if named else ""
    template = text if isinstance(text, str) else json.dumps(text, sort_keys=True)
    return hashlib.sha256((template + more).encode(errors="surrogateescape")).hexdigest()


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    path = directory / _TOKENIZER_CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return config
