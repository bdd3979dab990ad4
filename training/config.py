"""The training configuration: what a recipe file may say."""

import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from models.errors import ConfigError
from models.manifest import Name
from models.tokens import COCONOT_DESCRIPTIONS

DEMO = "demo"

REFUSAL_TEXTS: Mapping[str, str] = {
    "safety": "I can't help with that, because it could cause harm.",
    "humanizing": "I'm an AI, so I have no body, past or feelings of my own.",
    "incomplete": "I'm missing something I need to answer that. Could you tell me more?",
    "indeterminate": "There is no answer to that which can be known or agreed on.",
    "unsupported": "That needs something I don't have, such as images or live data.",
}
DEFAULT_REFUSAL_TEXT = "I can't help with that."

Text = Annotated[str, StringConstraints(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScratchModel(_Frozen):
    """A small Llama that starts from nothing, with a tokenizer trained on the data.

    Attributes:
        vocab_size: Entries of the vocabulary, control tokens included.
        hidden_size: Width; a multiple of `heads`.
        layers: Transformer layers.
        heads: Attention heads. Their size, `hidden_size / heads`, must suit the server's attention
            kernels: 32 or 64 do everywhere.
        intermediate_size: Width of the feed-forward layers.
        max_length: Longest sequence in tokens that the model is made for.
    """

    vocab_size: Annotated[int, Field(ge=300)] = 2048
    hidden_size: PositiveInt = 128
    layers: PositiveInt = 2
    heads: PositiveInt = 2
    intermediate_size: PositiveInt = 384
    max_length: Annotated[int, Field(ge=16)] = 512

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ScratchModel":
        if self.hidden_size % self.heads or self.hidden_size // self.heads not in (32, 64, 128):
            raise ValueError(
                f"hidden_size / heads must be 32, 64 or 128, got {self.hidden_size} / {self.heads}"
            )
        return self


class CheckpointModel(_Frozen):
    """A model that exists already and gets control tokens.

    Attributes:
        checkpoint: Its folder, or its repository on the model hub.
        revision: Branch, tag or commit on the hub.
    """

    checkpoint: Text
    revision: Text | None = None


class DataConfig(_Frozen):
    """What is learnt from.

    Attributes:
        train: JSONL files (training/data.py), relative to where the command runs; or `demo`, which
            renders the demo's data.
        seed: Seed of the demo's renderer.
    """

    train: Annotated[tuple[Text, ...], Field(min_length=1)] | Literal["demo"]
    seed: NonNegativeInt = 0


class OptimisationConfig(_Frozen):
    """How it is learnt.

    Attributes:
        epochs: Passes over the data.
        batch_size: Rows a device takes at once.
        gradient_accumulation_steps: Batches a step.
        learning_rate: At the end of the warm-up.
        warmup_ratio: Share of the steps that warm up.
        weight_decay: Of AdamW.
        beta2: Of AdamW.
        max_grad_norm: Gradients are clipped to this norm.
        scheduler: What the learning rate does after the warm-up.
        max_length: Longest row in tokens; longer ones are cut at their end.
        bf16: Whether to compute in bfloat16.
        gradient_checkpointing: Whether to save memory by computing activations twice.
    """

    epochs: PositiveFloat = 1.0
    batch_size: PositiveInt = 32
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: PositiveFloat = 2e-5
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: NonNegativeFloat = 0.0
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: PositiveFloat = 1.0
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    max_length: Annotated[int, Field(ge=16)] = 512
    bf16: bool = False
    gradient_checkpointing: bool = False


def _model_kind(value: Any) -> str:
    named = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return "existing" if "checkpoint" in named else "scratch"


Model = Annotated[
    Annotated[ScratchModel, Tag("scratch")] | Annotated[CheckpointModel, Tag("existing")],
    Discriminator(_model_kind),
]


class TrainConfig(_Frozen):
    """A recipe: everything that decides what a training run makes.

    Attributes:
        name: What the run is called.
        seed: Seed of the weights and of the order of the rows.
        model: What it starts from. With the key `checkpoint` an existing model, else a new one.
        data: What is learnt from.
        categories: Refusal categories with one line of description, in the order that breaks ties.
        refusal_texts: What a refusal says where the text is not generated, by category.
        decision_weight: Loss weight of the control token; every token of the text has 1.
        pair_decision_weight: The same in the rows of a counterfactual pair, where one prompt comes
            both refused and answered: they teach the text that follows a token, and their control
            tokens are noise to the decision.
        optimisation: How it is learnt.
    """

    name: Name
    seed: NonNegativeInt = 0
    model: Model
    data: DataConfig
    categories: Annotated[dict[Name, Text], Field(min_length=1)] = Field(
        default_factory=lambda: dict(COCONOT_DESCRIPTIONS)
    )
    refusal_texts: dict[Name, Text] = Field(default_factory=dict)
    decision_weight: PositiveFloat = 10.0
    pair_decision_weight: NonNegativeFloat = 0.0
    optimisation: OptimisationConfig = OptimisationConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        for name in self.refusal_texts:
            if name not in self.categories:
                raise ValueError(
                    f"refusal_texts names {name!r}, which is none of the categories "
                    f"{', '.join(self.categories)}"
                )
        if isinstance(self.model, ScratchModel):
            longest = self.model.max_length
            if self.optimisation.max_length > longest:
                raise ValueError(
                    f"optimisation.max_length is {self.optimisation.max_length}, more than the "
                    f"{longest} of model.max_length"
                )
        return self

    def refusal_text(self, category: str) -> str:
        """Returns what a refusal of `category` says where the text is not generated."""
        default = REFUSAL_TEXTS.get(category, DEFAULT_REFUSAL_TEXT)
        return self.refusal_texts.get(category, default)

    def to_yaml(self) -> str:
        """Returns the configuration with every default written out."""
        text: str = yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
        )
        return text

    def sha256(self) -> str:
        """Returns the hash of the configuration with every default written out."""
        canonical = json.dumps(self.model_dump(mode="json"), ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(path: str | Path) -> TrainConfig:
    """Reads a recipe.

    Args:
        path: A YAML file, or the bare name of a recipe that comes with the package.

    Raises:
        ConfigError: There is no such file or recipe, or it is wrong; one line for each wrong field.
    """
    text, origin = _read_recipe(str(path))
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin}: is no YAML: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: holds no fields; name, model and data are needed")
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(origin, detail) for detail in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _read_recipe(name: str) -> tuple[str, str]:
    recipes = files("training") / "recipes"
    packaged = recipes / f"{name}.yaml"
    if name.isidentifier() and packaged.is_file():
        return packaged.read_text(encoding="utf-8"), f"recipe {name}"
    try:
        return Path(name).read_text(encoding="utf-8"), name
    except (OSError, UnicodeDecodeError) as error:
        known = sorted(
            entry.name.removesuffix(".yaml")
            for entry in recipes.iterdir()
            if entry.name.endswith(".yaml")
        )
        raise ConfigError(
            f"{name}: is neither a recipe file that can be read nor a recipe of the package "
            f"({', '.join(known)})"
        ) from error


def _describe(origin: str, detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"]]
    if parts[:1] == ["model"] and parts[1:2] in (["scratch"], ["existing"]):
        del parts[1]
    if parts[:2] == ["data", "train"]:
        return f"{origin}: data.train: must be a list of JSONL files, or the word demo"
    where = ".".join(part for part in parts if part != "[key]")
    return f"{origin}: {where + ': ' if where else ''}{_reason(detail)}"


def _reason(detail: ErrorDetails) -> str:
    if detail["type"] == "extra_forbidden":
        return "no such field; check the spelling or take it out"
    if detail["type"] == "missing":
        return "is missing and has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    return f"{message[0].lower()}{message[1:]}, got {detail['input']!r}"
