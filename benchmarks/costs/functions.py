"""What finding a tenant, resolving dials and solving for rates cost, each alone."""

import itertools
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from starlette.datastructures import Headers

from models.calibration import BENIGN, Calibration, CalibrationInfo
from models.hashes import Hashes
from models.manifest import Manifest, load_manifest
from models.solver import Target, solve
from server.dials.board import DialBoard
from server.dials.calibrations import Calibrations
from server.dials.protocol import RefusalOptions, parse_options
from server.policies.credentials import generate_key, hash_key
from server.policies.loading import Served, load_policies

TENANTS = 10_000
# Prompts of each category of the made-up calibration, and benign ones.
PROMPTS = 1_000


def microseconds(function: Callable[[], object], calls: int) -> float:
    """Returns the median microseconds of a call."""
    taken = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        taken.append(1e6 * (time.perf_counter() - start))
    return float(np.median(taken))


def measure_functions(checkpoint: Path, calls: int) -> dict[str, float]:
    """Returns microseconds by what is done."""
    manifest = load_manifest(checkpoint)
    calibration = _calibration(manifest)
    calibrations = Calibrations({"default": calibration})
    board = DialBoard(manifest, RefusalOptions(), calibrations)
    rng = random.Random(0)

    def new_dials() -> RefusalOptions:
        return parse_options(
            {"categories": {n: {"bias": rng.uniform(-9, 9)} for n in manifest.names}}
        )

    def new_rates() -> dict[str, Target]:
        return {name: Target(rate=rng.uniform(0.2, 0.8)) for name in manifest.names}

    same = new_dials()
    drawn = iter([new_dials() for _ in range(calls)])
    asked = iter([new_rates() for _ in range(calls)])
    return {
        "a tenant by key, of 10,000": _look_up(manifest, calls),
        "the `refusal` field is read": microseconds(new_dials, calls),
        "dials, as the last request's": microseconds(lambda: board.resolve(same), calls),
        "dials, new ones": microseconds(lambda: board.resolve(next(drawn)), calls),
        f"rates of {len(manifest.names)} categories are solved": microseconds(
            lambda: solve(calibration, next(asked)), calls
        ),
    }


def _look_up(manifest: Manifest, calls: int) -> float:
    keys = [generate_key() for _ in range(TENANTS)]
    tenants = "\n".join(
        f'  t{i}: {{policies: [open], keys: ["{hash_key(key)}"]}}' for i, key in enumerate(keys)
    )
    with TemporaryDirectory() as folder:
        path = Path(folder) / "policies.yaml"
        path.write_text(f"policies:\n  open: {{}}\ntenants:\n{tenants}\n")
        book = load_policies(path, Served(manifest, Calibrations({})))
    sent = itertools.cycle(Headers({"authorization": f"Bearer {key}"}) for key in keys[::97])
    return microseconds(lambda: book.caller(next(sent)).policy(), calls)


def _calibration(manifest: Manifest) -> Calibration:
    count = len(manifest.names)
    category = np.repeat([*range(count), BENIGN], PROMPTS)
    margins = np.random.default_rng(0).normal(0, 4, (len(category), count))
    normaliser = np.logaddexp.reduce(np.c_[margins, np.zeros(len(margins))], axis=1)
    return Calibration(
        margins=margins.astype(np.float32),
        log_normaliser=normaliser.astype(np.float32),
        category=category,
        info=CalibrationInfo(
            name="default",
            created=datetime.now(UTC),
            categories=tuple(manifest.names),
            hashes=Hashes(weights="a" * 64, template="b" * 64, tokenizer="c" * 64),
            rheostat="0",
        ),
    )
