"""Histograms of margins: what the server counts of its traffic and `calibrate --check` reads.

Bins are fixed, so that counts of several servers and of several days add up. No prompt text, and
nothing that a prompt could be found again by.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from pydantic import field_validator as validates
from pydantic import model_validator as validates_model

from models.errors import ConfigError
from models.files import write_atomically
from models.manifest import Name

# Log-odds. A quarter of a nat moves a probability by at most 6.3 points; beyond 20 nats none does.
EDGES: tuple[float, ...] = tuple(quarter / 4 for quarter in range(-80, 81))
BINS = len(EDGES) + 1


def bin_index(margins: ArrayLike) -> NDArray[np.int64]:
    """Returns the bin of each margin.

    Args:
        margins: Log-odds of any shape, none of them NaN.

    Returns:
        int64 of the same shape, within `0..BINS - 1`: bin `i` holds `EDGES[i-1] <= m < EDGES[i]`,
        the first one everything below, the last one everything from the last edge on.
    """
    indices: NDArray[np.int64] = np.searchsorted(EDGES, np.asarray(margins), side="right")
    return indices.astype(np.int64)


def histogram(margins: ArrayLike) -> NDArray[np.int64]:
    """Returns how many margins fall into each bin, `[BINS]` int64."""
    return np.bincount(bin_index(margins).ravel(), minlength=BINS).astype(np.int64)


def share_refused(shares: ArrayLike, bias: float) -> float:
    """Returns the share of margins that a bias lifts to 0 or above.

    Args:
        shares: `[BINS]` share of the margins in each bin. Within a bin margins count as evenly
            spread; the outermost bins, which have no end, as lying at their only edge.
        bias: Log-odds; may be infinite.
    """
    above = np.cumsum(np.asarray(shares, dtype=np.float64)[::-1])[::-1]
    return float(np.interp(-bias, EDGES, above[1:], left=above[0], right=0.0))


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PolicyMargins(_Frozen):
    """The margins of one policy's traffic.

    Attributes:
        rows: Decisions recorded.
        counts: By category, how many of their margins fall into each bin; they add up to `rows`.
    """

    rows: NonNegativeInt
    counts: dict[Name, Annotated[tuple[NonNegativeInt, ...], Field(min_length=BINS)]]

    @validates_model(mode="after")
    def _adds_up(self) -> "PolicyMargins":
        for category, counts in self.counts.items():
            if len(counts) != BINS or sum(counts) != self.rows:
                raise ValueError(
                    f"{category}: {self.rows} decisions in {BINS} bins wanted, got {sum(counts)} "
                    f"in {len(counts)}"
                )
        return self


class RecordedMargins(_Frozen):
    """What a server recorded of its traffic's margins, as modelled, before any bias.

    Attributes:
        version: Version of this format.
        since: When recording began, ISO 8601.
        until: When the counts were read, ISO 8601.
        weights_sha256: Hash of the served weights, where the server knows it.
        edges: The bins' edges in log-odds; those of this version.
        policies: By policy. Requests without one count under `default`.
    """

    version: Literal[1] = 1
    since: str
    until: str
    weights_sha256: str | None = None
    edges: tuple[float, ...] = EDGES
    policies: dict[str, PolicyMargins]

    @validates("edges")
    @classmethod
    def _are_ours(cls, edges: tuple[float, ...]) -> tuple[float, ...]:
        if edges != EDGES:
            raise ValueError(f"{len(EDGES)} edges from {EDGES[0]} to {EDGES[-1]} wanted")
        return edges


def load_margins(path: Path) -> RecordedMargins:
    """Reads what `save_margins` wrote.

    Raises:
        ConfigError: The file cannot be read or is of another form.
    """
    try:
        return RecordedMargins.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise ConfigError(f"{path}: {where}: {first['msg']}") from error


def save_margins(path: Path, recorded: RecordedMargins) -> None:
    """Writes recorded margins atomically."""
    write_atomically(path, json.dumps(recorded.model_dump()) + "\n")
