"""What the parts of a training configuration share."""

import reprlib
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import ErrorDetails


def _without_nul(value: str) -> str:
    # No file and no repository can be called so, and what opens files fails in its own words.
    if "\0" in value:
        raise ValueError(f"must hold no NUL character, got {value!r}")
    return value


Text = Annotated[str, StringConstraints(min_length=1), AfterValidator(_without_nul)]
Share = Annotated[float, Field(ge=0, le=1)]
# What numpy takes.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Frozen(BaseModel):
    """A part of the configuration: no unknown fields, finite numbers, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def reason_of(detail: ErrorDetails) -> str:
    """Returns what is wrong with a field, in words that go behind its name."""
    if detail["type"] == "extra_forbidden":
        return "no such field; check the spelling or take it out"
    if detail["type"] == "missing":
        return "is missing and has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    return f"{message[0].lower()}{message[1:]}, got {_shown(detail['input'])}"


def _shown(value: object) -> str:
    # A wrong value may be a whole table, or hold itself.
    shortened = reprlib.Repr()
    shortened.maxstring = shortened.maxother = shortened.maxlong = 100
    shortened.maxlevel = 2
    return shortened.repr(value)
