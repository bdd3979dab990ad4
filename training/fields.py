"""What the parts of a training configuration share."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Frozen(BaseModel):
    """A part of the configuration: no unknown fields, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)
