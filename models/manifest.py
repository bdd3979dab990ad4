"""The checkpoint contract: ``rheostat.json`` beside the weights."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic import model_validator as validates_model

from models.errors import CheckpointError
from models.files import write_atomically

MANIFEST_NAME = "rheostat.json"

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,63}$")]
TokenId = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ControlToken(_Frozen):
    """One vocabulary item that opens an assistant turn.

    Attributes:
        token: Its text, leading space included where the checkpoint has one.
        id: Its id in the checkpoint's tokenizer.
    """

    token: Annotated[str, StringConstraints(min_length=1)]
    id: TokenId


class Category(ControlToken):
    """A refusal category and its token.

    Attributes:
        name: Its name in requests and policies.
        description: One line for people.
        refusal_text: The text of a refusal that is not generated.
        refusal_prefix: Where the control token is not kept, the text that a generated refusal
            begins with and goes on from; None generates none.
    """

    name: Name
    description: str = ""
    refusal_text: str = "I can't help with that."
    refusal_prefix: Annotated[str, StringConstraints(min_length=1)] | None = None


class Recipe(_Frozen):
    """How the checkpoint was made.

    Attributes:
        config_sha256: Hash of the resolved training config.
        data_sha256: Hash of every data file, by file name.
        loss: Name and parameters of the training loss.
        seed: Seed of the run.
    """

    config_sha256: str
    data_sha256: dict[str, str]
    loss: str
    seed: int


class Manifest(_Frozen):
    """What makes a checkpoint servable.

    Attributes:
        version: Version of this format.
        respond: The token after which an answer follows.
        categories: The refusal categories, in the order that breaks ties.
        recipe: How the checkpoint was made; absent for adopted ones.
        kept: Whether the control token stays in the context, so that the text follows it. Where it
            does not, the server decides first, an answer goes on from the prompt alone, and a
            refusal is the category's text, or generated behind the category's prefix.
    """

    version: Literal[1] = 1
    respond: ControlToken
    categories: Annotated[tuple[Category, ...], Field(min_length=1)]
    recipe: Recipe | None = None
    kept: bool = True

    @validates_model(mode="after")
    def _all_distinct(self) -> "Manifest":
        for what, values in (
            ("token", [t.token for t in self.control_tokens]),
            ("id", [str(t.id) for t in self.control_tokens]),
            ("category name", [c.name for c in self.categories]),
        ):
            repeated = sorted({v for v in values if values.count(v) > 1})
            if repeated:
                raise ValueError(f"duplicate {what} {repeated[0]!r}")
        return self

    @validates_model(mode="after")
    def _prefixes_are_needed(self) -> "Manifest":
        named = [c.name for c in self.categories if c.refusal_prefix is not None]
        if self.kept and named:
            raise ValueError(f"{named[0]}.refusal_prefix: the text follows the control token here")
        return self

    @property
    def control_tokens(self) -> tuple[ControlToken, ...]:
        """All control tokens, refusals first in category order, the respond token last."""
        return (*self.categories, self.respond)

    @property
    def control_ids(self) -> list[int]:
        """Their ids in the same order: the columns of every decision."""
        return [token.id for token in self.control_tokens]

    @property
    def names(self) -> list[str]:
        """The category names in order."""
        return [category.name for category in self.categories]


def load_manifest(directory: Path) -> Manifest:
    """Reads and validates ``rheostat.json`` of a checkpoint.

    models/checkpoint.py compares it with the tokenizer.

    Raises:
        CheckpointError: The file is missing or invalid.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: a checkpoint needs it to be served. `rheostat train` writes "
            "it; for a checkpoint that already has refusal tokens run `rheostat adopt`."
        )
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from error


def save_manifest(directory: Path, manifest: Manifest) -> Path:
    """Writes ``rheostat.json`` atomically and returns its path."""
    path = directory / MANIFEST_NAME
    write_atomically(path, manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
    return path
