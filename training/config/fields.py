"""What the parts of a training configuration share."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


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
