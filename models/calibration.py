"""Calibrations: the margins of prompts with known categories, bound to one checkpoint.

A calibration is one safetensors file, ``DIR/calibrations/NAME.safetensors``. It holds numbers only,
no text.
"""

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import CheckpointError, ConfigError
from models.files import write_atomically
from models.hashes import Hashes
from models.manifest import Name

CALIBRATIONS = "calibrations"
BENIGN = -1
# Below this a rate is a guess: even its 95 % interval spans more than 40 points.
LEAST_PROMPTS = 20

_SUFFIX = ".safetensors"
_METADATA_KEY = "rheostat"
_TENSORS = {"margins": np.float32, "log_normaliser": np.float32, "category": np.int64}
# What fp32 leaves of a log-sum-exp that is hardly larger than its largest term.
_ROUNDING = 1e-3

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


class CalibrationInfo(BaseModel):
    """A calibration's metadata.

    Attributes:
        version: Version of this format.
        name: Its name in requests and policies, and the file's.
        created: When it was measured, with time zone.
        categories: Category names in manifest order: the columns of the margins.
        hashes: The checkpoint that the margins belong to.
        data_sha256: Hash of every data file, by file name.
        seeds: Every seed, by its purpose.
        job_sha256: Hash of all that the margins depend on: checkpoint, prompts in their order,
            the engine's flags; None unless `rheostat calibrate` wrote the file.
        rheostat: Version of the package that wrote the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_recalibration(cls, values: Any) -> Any:
        # Earlier versions kept maps of probabilities in the file; no bias was read off them.
        if isinstance(values, dict):
            return {field: value for field, value in values.items() if field != "recalibration"}
        return values

    version: Literal[1] = 1
    name: Name
    created: datetime
    categories: Annotated[tuple[Name, ...], Field(min_length=1)]
    hashes: Hashes
    data_sha256: dict[str, str] = Field(default_factory=dict)
    seeds: dict[str, int] = Field(default_factory=dict)
    job_sha256: str | None = None
    rheostat: str


@dataclass(frozen=True, eq=False)
class Calibration:
    """The decision step of every calibration prompt. Hashed and compared by identity.

    Attributes:
        margins: ``[n, k]`` fp32, refusal logits minus the respond logit, in manifest order.
        log_normaliser: ``[n]`` fp32, log-sum-exp of the whole vocabulary minus the respond logit.
        category: ``[n]`` int64, the index of the category that a prompt belongs to, -1 benign.
        info: Where the margins come from.

    Raises:
        ConfigError: Shapes do not agree, a number is not finite, a category is unknown, empty or
            has fewer than ``LEAST_PROMPTS`` prompts, or every prompt is benign.
    """

    margins: Floats
    log_normaliser: Floats
    category: Integers
    info: CalibrationInfo

    def __post_init__(self) -> None:
        for field, dtype in _TENSORS.items():
            array = np.array(getattr(self, field), dtype=dtype, order="C")
            array.setflags(write=False)
            object.__setattr__(self, field, array)
        _check_shapes(self)
        _check_numbers(self)
        _check_categories(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The category names in manifest order."""
        return self.info.categories

    def column(self, category: str) -> int:
        """Returns the index of a category.

        Raises:
            ValueError: The calibration does not know it.
        """
        if category not in self.names:
            raise ValueError(f"{category!r} is none of {', '.join(self.names)}")
        return self.names.index(category)

    @cached_property
    def prompts(self) -> dict[str, int]:
        """Number of prompts by category name, in manifest order."""
        return {c: int((self.category == i).sum()) for i, c in enumerate(self.names)}

    @cached_property
    def benign(self) -> int:
        """Number of benign prompts."""
        return int((self.category == BENIGN).sum())


def calibration_path(directory: Path, name: str) -> Path:
    """Returns the path of a checkpoint's calibration."""
    return directory / CALIBRATIONS / f"{name}{_SUFFIX}"


def list_calibrations(directory: Path) -> dict[str, Path]:
    """Returns a checkpoint's calibration files by name, in alphabetical order."""
    return {path.stem: path for path in sorted((directory / CALIBRATIONS).glob(f"*{_SUFFIX}"))}


def save_calibration(directory: Path, calibration: Calibration) -> Path:
    """Writes a calibration into its checkpoint's folder and returns its path.

    If the process is killed, the old file or none is left: the new one is renamed once it is
    complete on disk.
    """
    from safetensors.numpy import save

    path = calibration_path(directory, calibration.info.name)
    path.parent.mkdir(exist_ok=True)
    content = save(
        {field: getattr(calibration, field) for field in _TENSORS},
        {_METADATA_KEY: calibration.info.model_dump_json()},
    )
    # No reader's pattern matches the partial file's suffix.
    write_atomically(path, content, unique=True)
    return path


def load_calibration(path: Path) -> Calibration:
    """Reads and validates one calibration; ``verify`` compares it with a checkpoint.

    Raises:
        CheckpointError: The file is missing, cut off or no calibration, or its numbers cannot be
            used; the message names the file.
    """
    from safetensors import SafetensorError

    try:
        tensors, info = _read(path)
        return Calibration(**tensors, info=info)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: the calibration cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "metadata"
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error.message}") from error


def verify(calibration: Calibration, hashes: Hashes, names: tuple[str, ...]) -> None:
    """Holds a calibration to the checkpoint that is about to be served.

    Args:
        calibration: As loaded.
        hashes: Of the checkpoint, by ``checkpoint_hashes``.
        names: The manifest's category names in order.

    Raises:
        CheckpointError: It was measured with other weights, another chat template, another
            tokenizer or other categories; the message names both sides.
    """
    name = calibration.info.name
    if calibration.names != tuple(names):
        raise CheckpointError(
            f"the calibration {name!r} knows the categories {', '.join(calibration.names)}, the "
            f"manifest {', '.join(names)}: calibrate this checkpoint anew"
        )
    measured = calibration.info.hashes
    for what in ("weights", "template", "tokenizer"):
        theirs, ours = getattr(measured, what), getattr(hashes, what)
        if theirs != ours:
            raise CheckpointError(
                f"the calibration {name!r} was measured with the {what} {theirs[:12]}, the "
                f"checkpoint has the {what} {ours[:12]}: calibrate this checkpoint anew"
            )


def _read(path: Path) -> tuple[dict[str, Any], CalibrationInfo]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        metadata = (file.metadata() or {}).get(_METADATA_KEY)
        missing = sorted(set(_TENSORS) - set(file.keys()))
        if metadata is None or missing:
            raise ConfigError(f"no calibration: it lacks {missing[0] if missing else 'metadata'}")
        tensors = {field: file.get_tensor(field) for field in _TENSORS}
    for field, dtype in _TENSORS.items():
        if tensors[field].dtype != dtype:
            raise ConfigError(
                f"{field} is {tensors[field].dtype}, a calibration has {np.dtype(dtype)}"
            )
    return tensors, CalibrationInfo.model_validate_json(metadata)


def _check_shapes(calibration: Calibration) -> None:
    n, k = len(calibration.category), len(calibration.names)
    wanted = {"margins": (n, k), "log_normaliser": (n,), "category": (n,)}
    for field, shape in wanted.items():
        actual = getattr(calibration, field).shape
        if actual != shape:
            raise ConfigError(
                f"{field} has the shape {list(actual)}; {n} prompts and {k} categories need "
                f"{list(shape)}"
            )
    if len(set(calibration.names)) < k:
        raise ConfigError(f"duplicate category name in {', '.join(calibration.names)}")


def _check_numbers(calibration: Calibration) -> None:
    for field in ("margins", "log_normaliser"):
        values = getattr(calibration, field)
        wrong = np.argwhere(~np.isfinite(values))
        if len(wrong):
            row = int(wrong[0][0])
            raise ConfigError(
                f"{field} of prompt {row} is not finite ({values[tuple(wrong[0])]}), as of "
                f"{len({int(index[0]) for index in wrong})} of {len(values)} prompts; the engine "
                "gives finite logits only where the checkpoint is sound"
            )
    largest = calibration.margins.max(axis=1, initial=0.0)
    low = np.flatnonzero(
        calibration.log_normaliser < largest - _ROUNDING * np.maximum(1.0, abs(largest))
    )
    if len(low):
        row = int(low[0])
        raise ConfigError(
            f"log_normaliser of prompt {row} is {calibration.log_normaliser[row]:g}, less than its "
            f"largest margin {largest[row]:g}: it must be the log-sum-exp of the whole vocabulary "
            "minus the respond logit"
        )


def _check_categories(calibration: Calibration) -> None:
    category, k = calibration.category, len(calibration.names)
    unknown = category[(category < BENIGN) | (category >= k)]
    if len(unknown):
        raise ConfigError(
            f"a prompt has the category {unknown[0]}, unknown among the {k} categories "
            f"{', '.join(calibration.names)}"
        )
    if not len(category):
        raise ConfigError("there are no prompts")
    if (category == BENIGN).all():
        raise ConfigError(
            "every prompt is benign: a rate needs prompts of each category that ought to be "
            f"refused, {', '.join(calibration.names)}"
        )
    for name, count in calibration.prompts.items():
        if count == 0:
            raise ConfigError(f"the category {name!r} has no prompt")
        if count < LEAST_PROMPTS:
            raise ConfigError(
                f"the category {name!r} has {count} prompts: it needs at least {LEAST_PROMPTS}, "
                "and 400 for a rate within 5 points"
            )
