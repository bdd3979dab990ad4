"""What a training begins with: a tokenizer with control tokens, and a model with a row for each."""

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.checkpoint import load_tokenizer
from models.errors import CheckpointError, ConfigError
from models.manifest import Manifest
from models.tokens import RESPOND, add_control_tokens, grow_embeddings, refusal_token
from training.config.recipe import CheckpointModel, ScratchModel, TrainConfig
from training.data.rows import Row
from training.model.gguf import model_folder
from training.model.scratch import LEAST_VOCABULARY, new_model, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = "plain"


class Start(NamedTuple):
    """What the training begins with.

    Attributes:
        manifest: Of the control tokens; without a recipe.
        config: The model's configuration, with its grown vocabulary.
        dtype: What the weights are exported as.
        make: Returns the model with a row for every control token, the same at every call.
    """

    tokenizer: "PreTrainedTokenizerBase"
    manifest: Manifest
    config: Any
    dtype: str
    make: Callable[[], Any]


def start_of(config: TrainConfig, rows: Sequence[Row]) -> Start:
    """Returns what a recipe begins with."""
    if isinstance(config.model, ScratchModel):
        return _from_scratch(config, config.model, rows)
    return _from_checkpoint(config, config.model)


def _from_scratch(config: TrainConfig, model: ScratchModel, rows: Sequence[Row]) -> Start:
    controls = {RESPOND, *map(refusal_token, config.token_categories)}
    if model.vocab_size - len(controls) < LEAST_VOCABULARY:
        raise ConfigError(
            f"model.vocab_size: {model.vocab_size} leaves no room for {LEAST_VOCABULARY} entries "
            f"beside {len(controls)} control tokens"
        )
    tokenizer = train_tokenizer(
        (turn.content for row in rows for turn in row.messages),
        model.vocab_size - len(controls),
        model.max_length,
    )
    manifest = add_control_tokens(tokenizer, config.token_categories)
    return _start(tokenizer, manifest, "float32", lambda: new_model(model, tokenizer, config.seed))


def _from_checkpoint(config: TrainConfig, source: CheckpointModel) -> Start:
    folder = model_folder(source)
    tokenizer = tokenizer_of(source, folder)
    manifest = add_control_tokens(tokenizer, config.token_categories)
    stored = stored_dtype(folder)
    # AdamW in bfloat16 loses small updates: bf16 training is autocast over fp32 weights, except
    # under adapters, where the stored weights are frozen and only fp32 adapters move.
    frozen = config.lora is not None and config.optimisation.bf16
    loaded_as = stored if frozen else "float32"

    def build() -> Any:
        model = load_model(folder, loaded_as)
        grow_embeddings(model, tokenizer, manifest)
        return model

    return _start(tokenizer, manifest, stored, build)


def _start(
    tokenizer: "PreTrainedTokenizerBase", manifest: Manifest, dtype: str, build: Callable[[], Any]
) -> Start:
    # The configuration has to be known at once, and loading 8 billion weights twice takes minutes.
    try:
        built = [build()]
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise ConfigError("model: its weights do not fit into this machine's memory") from error
    config = built[0].config
    return Start(tokenizer, manifest, config, dtype, lambda: built.pop() if built else build())


def tokenizer_of(source: CheckpointModel, folder: Path) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of an existing model, with the chat template that the recipe gives it.

    Raises:
        ConfigError: It has no chat template and is given none, or none that can be read.
    """
    tokenizer = load_tokenizer(folder)
    if source.chat_template is not None:
        tokenizer.chat_template = _template(source.chat_template)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model: {source.checkpoint} has no chat template; set model.chat_template to plain or "
            "to a Jinja file"
        )
    return tokenizer


def _template(name: str) -> str:
    packaged = files("training") / "templates" / f"{name}.jinja"
    try:
        if name == PLAIN:
            return packaged.read_text(encoding="utf-8")
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template: {name} cannot be read: {error}") from error


def model_config(folder: Path) -> Any:
    """Returns the configuration of an existing model; its weights need not be there."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unloadable(folder, error) from error


def stored_dtype(folder: Path) -> str:
    """Returns what the weights of an existing model are stored as, such as `bfloat16`."""
    return str(model_config(folder).dtype or "float32").removeprefix("torch.")


def load_model(folder: Path, dtype: str) -> Any:
    """Loads an existing model, with every weight that its configuration names.

    Raises:
        CheckpointError: It cannot be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, found = load(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            # Told below, in one line.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise _unloadable(folder, error) from error
    _check_whole(folder, found)
    return model


def _check_whole(folder: Path, found: Mapping[str, Any]) -> None:
    """Checks that every weight was found: transformers fills in random ones for the others."""
    kinds = {
        "missing": sorted(found["missing_keys"]),
        "of another shape": sorted(name for name, *_ in found["mismatched_keys"]),
    }
    for kind, names in kinds.items():
        if names:
            raise CheckpointError(
                f"{folder}: the weights do not fit config.json: {len(names)} are {kind}, the first "
                f"is {names[0]}"
            )


def _unloadable(folder: Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()[0]
    return CheckpointError(f"{folder}: the model cannot be loaded: {reason}")
