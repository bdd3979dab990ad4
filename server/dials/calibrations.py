"""The calibrations of the served checkpoint, and their solutions."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from models.calibration import (
    Calibration,
    list_calibrations,
    load_calibration,
    verify,
)
from models.curves import curve
from models.errors import CheckpointError, RequestError
from models.hashes import Hashes, checkpoint_hashes
from models.manifest import Manifest
from models.solver import Solution, Target, bias_alone, solve, warm_up

DEFAULT_CALIBRATION = "default"
MOST_SOLUTIONS = 4096
HOW_TO = "`rheostat calibrate --model DIR --data FILE` makes one, and a restart loads it"


class Question(NamedTuple):
    """What is to be solved; the key of the cache.

    Attributes:
        targets: In manifest order; None keeps a category as trained.
        total: Upper bound of all false refusals together.
    """

    calibration: str
    targets: tuple[Target | None, ...]
    total: float | None


class Calibrations:
    """Named calibrations of one checkpoint. Names come from clients, and never become paths."""

    def __init__(self, loaded: Mapping[str, Calibration]) -> None:
        self._loaded = dict(loaded)
        self._solve = lru_cache(maxsize=MOST_SOLUTIONS)(self._solve_anew)
        self._describe = lru_cache(maxsize=len(self._loaded))(self._describe_anew)

    def __reduce__(self) -> tuple[type["Calibrations"], tuple[dict[str, Calibration]]]:
        """Leaves the caches out, for another process."""
        return Calibrations, (self._loaded,)

    @property
    def names(self) -> list[str]:
        """Their names, sorted."""
        return sorted(self._loaded)

    @property
    def loaded(self) -> Mapping[str, Calibration]:
        """The calibrations by name."""
        return self._loaded

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    def require(self, name: str, *, param: str, status: int = 422) -> None:
        """Rejects a calibration that is not loaded.

        Raises:
            RequestError: It lists the loaded ones, or says how to make one.
        """
        if name in self._loaded:
            return
        if not self._loaded:
            raise RequestError(
                f"{param}: this checkpoint has no calibration, which rates need; {HOW_TO}",
                param=param,
                status=status,
            )
        raise RequestError(
            f"{param}: no calibration is named {name!r}; loaded are {', '.join(self.names)}",
            param=param,
            status=status,
        )

    def solve(self, question: Question) -> Solution:
        """Returns the biases that meet a question's targets, from the cache if possible.

        Raises:
            RequestError: The calibration cannot certify a bound.
        """
        return self._solve(question)

    def bias_alone(self, name: str, category: str, target: Target, *, param: str) -> float:
        """Returns the bias that meets one category's target by its own token, all others off.

        Args:
            param: The path of the field, for an error.

        Raises:
            RequestError: No calibration has that name, or it cannot certify the bound.
        """
        self.require(name, param=param)
        try:
            return bias_alone(self._loaded[name], category, target)
        except RequestError as error:
            raise RequestError(f"{param}: {error.message}", param=param) from error

    def prompts(self, name: str, category: str) -> int:
        """Returns how many prompts of a category a calibration has."""
        return self._loaded[name].prompts[category]

    def solved(self) -> Any:
        """Returns the cache's ``CacheInfo``: hits, misses, maxsize, currsize."""
        return self._solve.cache_info()

    def describe(self, name: str) -> dict[str, Any]:
        """Returns a calibration with its curves, as JSON. The first call computes the curves."""
        return self._describe(name)

    def _solve_anew(self, question: Question) -> Solution:
        calibration = self._loaded[question.calibration]
        named = zip(calibration.names, question.targets, strict=True)
        return solve(
            calibration,
            {name: target for name, target in named if target is not None},
            question.total,
        )

    def _describe_anew(self, name: str) -> dict[str, Any]:
        calibration = self._loaded[name]
        return {
            "object": "refusal.calibration",
            "name": name,
            "names": self.names,
            "created": calibration.info.created.isoformat(),
            # Without the hashes of the data: their file names are the operator's.
            "hashes": calibration.info.hashes.model_dump(),
            "prompts": {**calibration.prompts, "benign": calibration.benign},
            "categories": [
                {
                    "name": category,
                    "prompts": calibration.prompts[category],
                    "curve": _points(calibration, category),
                }
                for category in calibration.names
            ],
        }


def _points(calibration: Calibration, category: str) -> list[dict[str, Any]]:
    return [
        {
            "bias": point.bias,
            "sensitivity": point.sensitivity,
            "refusal_rate": point.rate,
            "refusal_rate_interval": point.rate_interval,
            "false_refusal_rate": point.false_refusal_rate,
            "false_refusal_rate_interval": point.interval,
        }
        for point in curve(calibration, category)
    ]


def load_calibrations(
    directory: Path, manifest: Manifest, hashes: Hashes | None = None
) -> Calibrations:
    """Loads and verifies every calibration of a checkpoint.

    Args:
        hashes: The checkpoint's; None computes them if there is a calibration.

    Raises:
        CheckpointError: A file is broken, has another name than its content says, or was measured
            with other weights, another chat template or another tokenizer.
    """
    paths = list_calibrations(directory)
    if not paths:
        return Calibrations({})
    hashes = hashes or checkpoint_hashes(directory)
    loaded = {}
    for name, path in paths.items():
        calibration = load_calibration(path)
        if calibration.info.name != name:
            raise CheckpointError(
                f"{path}: the calibration says that its name is {calibration.info.name!r}"
            )
        verify(calibration, hashes, tuple(manifest.names))
        # The first solve imports scipy and sorts the margins: no request should wait for it.
        warm_up(calibration)
        loaded[name] = calibration
    return Calibrations(loaded)
