"""The training configuration: what a recipe file may say."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from importlib.resources import files
from operator import not_
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from models.errors import ConfigError
from models.files import parse_yaml
from models.manifest import Name
from models.tokens import COCONOT_DESCRIPTIONS, SINGLE, SINGLE_DESCRIPTION
from training.config.data import DataConfig, Origin
from training.config.fields import Frozen, Seed, Share, Text, reason_of
from training.config.loss import FORMS, LossConfig

REFUSAL_TEXTS: Mapping[str, str] = {
    "safety": "I can't help with that, because it could cause harm.",
    "humanizing": "I'm an AI, so I have no body, past or feelings of my own.",
    "incomplete": "I'm missing something I need to answer that. Could you tell me more?",
    "indeterminate": "There is no answer to that which can be known or agreed on.",
    "unsupported": "That needs something I don't have, such as images or live data.",
}
DEFAULT_REFUSAL_TEXT = "I can't help with that."
# What settings of one number a category, and the judge of texts, call the answers.
RESPOND = "respond"
ANSWERS = (RESPOND, "answer")


class ScratchModel(Frozen):
    """A small Llama that starts from nothing, with a tokenizer trained on the data.

    Attributes:
        vocab_size: Entries of the vocabulary, control tokens included.
        hidden_size: Width; a multiple of `heads`.
        heads: Attention heads. Their size, `hidden_size / heads`, must suit the server's attention
            kernels: 32 or 64 do everywhere.
        intermediate_size: Width of the feed-forward layers.
        max_length: Longest sequence in tokens that the model is made for.
    """

    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)] = 2048
    hidden_size: PositiveInt = 128
    layers: Annotated[int, Field(ge=1, le=1000)] = 2
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


class CheckpointModel(Frozen):
    """A model that exists already and gets control tokens.

    Attributes:
        checkpoint: Its folder, its repository on the model hub, or a GGUF file: its path, or
            `package:NAME/FILE.gguf` for one in an installed package.
        revision: Branch, tag or commit on the hub.
        chat_template: A Jinja file in place of its own chat template; or `plain`, the package's,
            for a base model that has none.
    """

    checkpoint: Text
    revision: Text | None = None
    chat_template: Text | None = None


class LoraConfig(Frozen):
    """Low-rank adapters in place of a full fine-tune; merged into the weights on export.

    Attributes:
        alpha: Scale; the adapter counts alpha / r.
        dropout: In front of the adapter.
        target_modules: Names of the linear layers that get one, or all of them.
    """

    r: PositiveInt = 64
    alpha: PositiveInt = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1)] | Literal["all-linear"] = (
        "all-linear"
    )


class OptimisationConfig(Frozen):
    """How it is learnt.

    Attributes:
        epochs: Passes over the data.
        batch_size: Rows a process takes at once; with `packing`, sequences.
        gradient_accumulation_steps: Batches a step.
        learning_rate: At the end of the warm-up.
        warmup_ratio: Share of the steps that warm up.
        max_grad_norm: Gradients are clipped to this norm.
        scheduler: What the learning rate does after the warm-up.
        max_length: Longest row in tokens; longer ones are cut at their end.
        bf16: Whether to compute in bfloat16.
        gradient_checkpointing: Whether to save memory by computing activations twice.
        packing: Whether short rows share a sequence of up to `max_length`, without seeing each
            other.
        fused_head: Whether the loss is computed in chunks, without logits of the whole vocabulary
            for every token. `auto`: from a vocabulary of 16,384 on.
        save_every: Share of the steps after which a killed run goes on, 0 for from the start. A
            point takes three times the space of the trained weights in fp32; two are kept.
    """

    epochs: PositiveFloat = 1.0
    batch_size: PositiveInt = 32
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    learning_rate: PositiveFloat = 2e-5
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    weight_decay: NonNegativeFloat = 0.0
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    max_grad_norm: PositiveFloat = 1.0
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    max_length: Annotated[int, Field(ge=16)] = 512
    bf16: bool = False
    gradient_checkpointing: bool = False
    packing: bool = False
    fused_head: bool | Literal["auto"] = "auto"
    save_every: Share = 0.1


class EvaluationConfig(Frozen):
    """What is measured during the training, on the decision token.

    Attributes:
        data: Sources as in `data.train`, or `demo`: the demo's calibration rows. Never what a
            result is reported on: the best checkpoint is chosen by it.
        every: Share of the steps between two measurements.
        rows: At most so many rows, drawn at random.
        best: What chooses the checkpoint that is kept; `last` keeps the last one.
        at_start: Whether the model is also measured before the first step.
    """

    data: Origin
    every: Annotated[float, Field(gt=0, le=1)] = 0.1
    rows: PositiveInt = 2000
    best: Literal["auc", "refused_at_5", "calibration_error", "loss", "last"] = "auc"
    at_start: bool = True


def _model_kind(value: Any) -> str:
    named = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    return "existing" if "checkpoint" in named else "scratch"


Model = Annotated[
    Annotated[ScratchModel, Tag("scratch")] | Annotated[CheckpointModel, Tag("existing")],
    Discriminator(_model_kind),
]


class TrainConfig(Frozen):
    """A recipe: everything that decides what a training run makes.

    Attributes:
        seed: Seed of the weights and of the order of the rows.
        model: What it starts from. With the key `checkpoint` an existing model, else a new one.
        categories: Refusal categories with one line of description, in the order that breaks ties.
        refusal_texts: What a refusal says where the text is not generated, by category.
        refusal_prefixes: What a generated refusal begins with, by category; for `train: tokens`.
        single_token: Whether the checkpoint has one refusal token, `[refuse]`, and no categories;
            every refused row counts for it.
        train: `full`: every weight. `lora`: adapters. `tokens`: none, only the output rows of the
            control tokens of an existing model. None: adapters where `lora` is given, else full.
        loss: What is minimised.
        lora: Adapters, for an existing model.
        evaluation: What is measured on the way; None measures nothing.
        report_to: Where the log goes besides the checkpoint's folder.
    """

    name: Name
    seed: Seed = 0
    model: Model
    data: DataConfig
    categories: Annotated[dict[Name, Text], Field(min_length=1)] = Field(
        default_factory=lambda: dict(COCONOT_DESCRIPTIONS)
    )
    refusal_texts: dict[Name, Text] = Field(default_factory=dict)
    # Not in the hash where it is empty: recipes from before it keep theirs.
    refusal_prefixes: dict[Name, Text] = Field(default_factory=dict, exclude_if=not_)
    single_token: bool = False
    train: Literal["full", "lora", "tokens"] | None = None
    loss: LossConfig = LossConfig()
    lora: LoraConfig | None = None
    optimisation: OptimisationConfig = OptimisationConfig()
    evaluation: EvaluationConfig | None = None
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _with_adapters(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("train") == "lora":
            return {**values, "lora": values.get("lora") or {}}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        for name in ANSWERS:
            if name in self.categories:
                raise ValueError(
                    f"categories: {name} is what the answers are called; choose another name"
                )
        for field in ("refusal_texts", "refusal_prefixes"):
            self._check_names(field, getattr(self, field), self.token_categories)
        decisions = (*self.token_categories, RESPOND)
        for name, setting in (("q", self.loss.decision.q), ("gamma", self.loss.decision.gamma)):
            if isinstance(setting, dict):
                self._check_names(f"loss.decision.{name}", setting, decisions)
        self._check_way()
        if isinstance(self.model, ScratchModel):
            longest = self.model.max_length
            if self.optimisation.max_length > longest:
                raise ValueError(
                    f"optimisation.max_length is {self.optimisation.max_length}, more than the "
                    f"{longest} of model.max_length"
                )
            if self.lora is not None:
                raise ValueError(
                    "lora adapts an existing model: give model.checkpoint, or take lora out"
                )
        return self

    def _check_way(self) -> None:
        if self.train in ("full", "tokens") and self.lora is not None:
            raise ValueError(f"train: {self.train} has no adapters; take lora out, or train: lora")
        if self.train != "tokens":
            if self.refusal_prefixes:
                raise ValueError("refusal_prefixes are for train: tokens: elsewhere models write")
            return
        if isinstance(self.model, ScratchModel):
            raise ValueError("train: tokens needs an existing model: give model.checkpoint")
        if (self.loss.decision.q, self.loss.decision.gamma) != (0.0, 0.0):
            raise ValueError("train: tokens minimises cross-entropy: leave q and gamma at 0")

    @staticmethod
    def _check_names(field: str, names: Iterable[str], known: Collection[str]) -> None:
        for name in names:
            if name not in known:
                raise ValueError(f"{field} names {name!r}, which is none of {', '.join(known)}")

    @property
    def token_categories(self) -> dict[str, str]:
        """The categories that have a token, with their descriptions."""
        return {SINGLE: SINGLE_DESCRIPTION} if self.single_token else self.categories

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
        values = self.model_dump(mode="json")
        if self.train is None:
            del values["train"]  # as before there was the field: what is finished stays so
        canonical = json.dumps(values, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_config(path: str | Path) -> TrainConfig:
    """Reads a recipe.

    Args:
        path: A YAML file, or the bare name of a recipe that comes with the package.

    Raises:
        ConfigError: There is no such file or recipe, or it is wrong; one line for each wrong field.
    """
    text, origin = _read_recipe(str(path))
    values = parse_yaml(text, origin)
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: holds no fields; name, model and data are needed")
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        lines = [_describe(origin, detail) for detail in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def packaged_recipes() -> list[str]:
    """Returns the names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in (files("training") / "recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def _read_recipe(name: str) -> tuple[str, str]:
    known = packaged_recipes()
    if name in known:
        text = (files("training") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
        return text, f"recipe {name}"
    try:
        return Path(name).read_text(encoding="utf-8"), name
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{name}: is neither a recipe file that can be read nor a recipe of the package "
            f"({', '.join(known)})"
        ) from error


def _describe(origin: str, detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"]]
    if parts[:1] == ["model"] and parts[1:2] in (["scratch"], ["existing"]):
        del parts[1]
    if parts[:1] == ["loss"] and parts[3:4] and parts[3] in FORMS:
        del parts[3]
    if parts[:2] in (["data", "train"], ["evaluation", "data"]):
        parts = [*parts[:2], *(part for part in parts[2:] if part not in ("sources", "demo"))]
        if len(parts) == 2 or detail["type"] == "model_type":
            return f"{origin}: {'.'.join(parts[:2])}: must be a list of sources, or the word demo"
    where = ".".join(part for part in parts if part != "[key]")
    return f"{origin}: {where + ': ' if where else ''}{reason_of(detail)}"
