"""Dial boards for tests that need no engine, and a calibration that can be solved by hand."""

from datetime import UTC, datetime

import numpy as np

from models.calibration import Calibration, CalibrationInfo
from models.hashes import Hashes
from server.dials.board import DialBoard
from server.dials.calibrations import Calibrations
from server.dials.protocol import DialOptions, RefusalOptions
from server.policies.book import PolicyBook
from server.web.admission import Admission
from tests.server.manifests import MANIFEST

HASHES = Hashes(weights="a" * 64, template="b" * 64, tokenizer="c" * 64)
OWN = 40
BENIGN = 100


def calibration(name: str = "default", hashes: Hashes = HASHES) -> Calibration:
    """Returns a calibration whose categories have nothing to do with each other.

    The 40 prompts of each category have the margins -19.5, -18.5, ... 19.5 in their own column and
    -100 in the other; the 100 benign prompts have -30.5, -31.5, ... -129.5 in both.
    """
    own = np.arange(OWN) - 19.5
    far = np.full(OWN, -100.0)
    benign = -30.5 - np.arange(BENIGN)
    margins = np.concatenate(
        [np.stack([own, far], 1), np.stack([far, own], 1), np.stack([benign, benign], 1)]
    )
    return Calibration(
        margins=margins.astype(np.float32),
        log_normaliser=np.logaddexp(0.0, np.logaddexp(*margins.T)).astype(np.float32),
        category=np.repeat([0, 1, -1], [OWN, OWN, BENIGN]),
        info=CalibrationInfo(
            name=name,
            created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            categories=tuple(MANIFEST.names),
            hashes=hashes,
            data_sha256={"secret-tenant.csv": "d" * 64},
            rheostat="1",
        ),
    )


def calibrations(*names: str) -> Calibrations:
    return Calibrations({name: calibration(name) for name in names})


def board(defaults: DialOptions | None = None, *names: str) -> DialBoard:
    """Returns a board with the named calibrations loaded."""
    return DialBoard(MANIFEST, defaults or RefusalOptions(), calibrations(*names))


def wide_admission() -> Admission:
    """Returns an admission that nothing fills."""
    return Admission(10**6)


def everybody(defaults: DialOptions | None = None, *names: str) -> PolicyBook:
    """Returns the policies of a server without a policy file."""
    return PolicyBook.for_everybody(board(defaults, *names))
