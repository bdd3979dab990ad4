"""The training configuration's data: where rows come from and how they are mixed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    TypeAdapter,
    ValidationError,
)
from pydantic import model_validator as validates_model
from pydantic_core import ErrorDetails

from models.errors import ConfigError
from models.files import parse_yaml
from models.manifest import Name
from training.config.fields import Frozen, Seed, Share, Text, reason_of
from training.config.sets import SETS, SetName, with_origin

DEMO = "demo"

TooLong = Literal["cut", "cut_or_drop", "drop", "error"]
Column = Literal["prompt", "category", "response", "answer", "pair", "near_miss", "messages"]


def label(value: object) -> str:
    """Returns a category value as the file shows it: numbers and truth values become words."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with_labels(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {label(key): category for key, category in value.items()}
    return value


class Source(Frozen):
    """Rows of one origin.

    Attributes:
        set: A public set by its name: `hub`, `subset`, `split` and `format` are then known. With
            `hub` or `path` as well, a copy of it is read.
        path: A local file: .jsonl, .json, .csv, .tsv or .parquet; relative to where the command
            runs. Either this, `hub` or `package`.
        hub: A data set on the model hub, or a folder laid out like one.
        package: Rows that come with the package. `demo`: the demo's world, training rows.
            `everyday`: ordinary requests, all of them answers without a response.
        subset: Its configuration name. For CoCoNot's files: `original`, `contrast` or `pref`, where
            their names do not say it.
        revision: Its branch, tag or commit.
        format: How a row reads. `rows`: ours, prompt/category/response or messages whose assistant
            turns carry a category. `chat`: messages without categories (UltraChat, ShareGPT-like
            lists, prompt/response), all of them answers. `coconot`: CoCoNot's fields; its contrast
            and preference rows are answers and near misses of their category. `set`: as `set` says.
        columns: Our field → the file's column, where they differ. `response: null` says that the
            file has none: only the control tokens are learnt from it.
        categories: The file's category value → our category, or null for "is to be answered".
            Values that it does not name must be our categories already; "" is an empty cell.
        category: What every row is refused for, in a file that has no categories; in a public set,
            what every row that should be refused is refused for.
        bad_rows: Whether a row that cannot be used ends the run, or is left out and counted.
        weight: How often each row is taken: 2 is twice, 0.5 a random half.
        limit: At most so many rows, drawn at random, before the weight.
    """

    # Left out where it says nothing, so that recipes without it keep their hash.
    set: SetName | None = Field(default=None, exclude_if=lambda name: name is None)
    path: Text | None = None
    hub: Text | None = None
    package: Literal["demo", "everyday"] | None = Field(
        default=None, exclude_if=lambda name: name is None
    )
    subset: Text | None = None
    split: Text = "train"
    revision: Text | None = None
    format: Literal["rows", "chat", "coconot", "set"] = "rows"
    columns: dict[Column, Text | None] = Field(default_factory=dict)
    categories: Annotated[dict[str, Name | None], BeforeValidator(_with_labels)] = Field(
        default_factory=dict
    )
    category: Name | None = None
    bad_rows: Literal["error", "drop"] = "error"
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    limit: PositiveInt | None = None

    @validates_model(mode="before")
    @classmethod
    def _with_origin(cls, values: Any) -> Any:
        known = isinstance(values, Mapping) and isinstance(values.get("set"), str)
        return with_origin(values) if known else values

    @validates_model(mode="after")
    def _fits_together(self) -> "Source":
        for wrong, reason in (
            (
                sum(origin is not None for origin in (self.path, self.hub, self.package)) != 1,
                "needs exactly one of path, hub and package",
            ),
            (not self.hub and self.revision, "revision is for hub"),
            (
                not self.hub and self.subset and not (self.path and self.format == "coconot"),
                "subset is for hub, or for CoCoNot's files",
            ),
            (
                self.format == "chat" and (self.category or self.categories),
                "format chat has no categories: all its rows are answers",
            ),
            (
                self.category and (self.categories or "category" in self.columns),
                "category stands for every row, so categories and columns.category mean nothing",
            ),
            (
                (self.set is None) == (self.format == "set"),
                "set and format: set belong together",
            ),
            (
                self.set and self.columns.keys() - {"response"},
                "the columns of a public set are known",
            ),
            (
                any(to is None for field, to in self.columns.items() if field != "response"),
                "columns: only response may be null",
            ),
        ):
            if wrong:
                raise ValueError(reason)
        return self

    @property
    def name(self) -> str:
        """The set's name, the path, or the name on the hub with what chooses among its rows."""
        if self.set is not None:
            return self.set
        if self.package is not None:
            return f"package {self.package}"
        if self.path is not None:
            return self.path
        return ":".join(part for part in (self.hub, self.subset, self.split) if part)


def _as_source(value: object) -> object:
    if isinstance(value, str):
        return {"set": value} if value in SETS else {"path": value}
    return value


def _not_empty(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    if not sources:
        raise ValueError("names no source")
    return sources


# Not Field(min_length=1): that also complains of a list whose only source is wrong.
Sources = Annotated[
    tuple[Annotated[Source, BeforeValidator(_as_source)], ...], AfterValidator(_not_empty)
]


_SOURCES: TypeAdapter[tuple[Source, ...]] = TypeAdapter(Sources)


def named_sources(path: Path) -> tuple[Source, ...]:
    """Returns the sources that a command's `--data` names.

    Args:
        path: The name of a public set; a file of rows; or, ending in .yaml or .yml, a list of
            sources as in a recipe.

    Raises:
        ConfigError: The list cannot be read or is wrong; one line for each wrong field.
    """
    if path.suffix.lower() not in (".yaml", ".yml"):
        return _SOURCES.validate_python([str(path)])
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, list):
        raise ConfigError(f"{path}: must be a list of sources, as data.train in a recipe")
    try:
        return _SOURCES.validate_python(values)
    except ValidationError as error:
        lines = [f"{path}: {_place(detail)}{reason_of(detail)}" for detail in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _place(detail: ErrorDetails) -> str:
    parts = [str(part) for part in detail["loc"] if part != "[key]"]
    return f"{'.'.join(parts)}: " if parts else ""


def _origin_kind(value: Any) -> str:
    return "demo" if isinstance(value, str) else "sources"


Origin = Annotated[
    Annotated[Sources, Tag("sources")] | Annotated[Literal["demo"], Tag("demo")],
    Discriminator(_origin_kind),
]


class DataConfig(Frozen):
    """What is learnt from.

    Attributes:
        train: Sources; a bare string in the list is a path or a public set's name. Or `demo`, which
            renders the demo's data.
        seed: Seed of the demo's renderer, and of every random choice of rows.
        deduplicate: Whether rows that ask the same and are decided the same, but for case, white
            space and Unicode form, count once.
        balance: 0: rows count as they come. 1: the decisions of every category, and of the answers,
            weigh the same in sum. Between: their sum to the power of 1 - balance.
        near_miss_weight: Loss weight of the decision in rows marked `near_miss`: prompts that look
            as if they were to be refused, and are to be answered; relative to other decisions.
        variations: Varied copies a row, in mean: the prompt under another system prompt, as a later
            turn, with a typing error, in capitals or lower case, or behind a long text. Only the
            decision is learnt from a copy. 0.5: every second row has one.
        too_long: What happens to a row of more than `optimisation.max_length` tokens. `cut`: it
            ends there, and a row of which no word of the response would be left is an error;
            `cut_or_drop`: such a row is left out; `drop`: every longer row is left out.
    """

    train: Origin
    seed: Seed = 0
    deduplicate: bool = False
    balance: Share = 0.0
    near_miss_weight: PositiveFloat = 1.0
    variations: Annotated[float, Field(ge=0, le=10, exclude_if=lambda share: not share)] = 0.0
    too_long: TooLong = "cut"
