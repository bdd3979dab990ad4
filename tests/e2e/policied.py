"""A server with a policy file; its tenants' floors refuse every prompt, or harmful ones."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np

from models.calibration import (
    BENIGN,
    CALIBRATIONS,
    Calibration,
    CalibrationInfo,
    save_calibration,
)
from models.hashes import checkpoint_hashes
from models.manifest import load_manifest
from server.policies.credentials import generate_key, hash_key
from tests.e2e.servers import Server, http_client, rheostat_server

ACME, SHOP, SECRET, CLINIC, PRESS, CROWD = (generate_key() for _ in range(6))
CROWDS_MOST = 3
FIXED_TEXT = "Please ask at the desk."
GRADED_SENSITIVITY = 0.95
# A floor of 60 nats refuses every prompt, so one answer would be one too many.
FILE = f"""\
policies:
  desk:
    floors: {{safety: {{bias: 60}}}}
    raw_prompts: true
    prefill: true
    grammars: true
    report: true
    defaults: {{report: true}}
  kiosk:
    floors: {{safety: {{bias: 60}}}}
    raw_prompts: true
    grammars: true
    refusal_text: {{safety: {FIXED_TEXT}}}
  trial:
    floors: {{safety: {{bias: 60}}}}
    raw_prompts: true
    enforce: false
    report: true
    grammars: true
  rated:
    floors: {{safety: {{rate: 0.9}}}}
    report: true
  lab:
    defaults: {{categories: {{safety: never}}}}
  # At this floor benign prompts are answered and harmful ones refused.
  graded: &graded
    floors: {{safety: {GRADED_SENSITIVITY}}}
    raw_prompts: true
    report: true
    grammars: true
    defaults: {{report: true}}
  prefilled:
    <<: *graded
    prefill: true
  free_text:
    <<: *graded
    grammars: false
  strict:
    floors: {{safety: {{bias: 60}}}}
    ceilings: {{humanizing: 0.5}}
    outside: refuse
tenants:
  acme:
    policies: [desk, lab, kiosk, trial, rated]
    keys: ["{hash_key(ACME)}"]
  shop:
    policies: [strict]
    keys: ["{hash_key(SHOP)}"]
    header: shop
  clinic:
    policies: [graded, lab]
    keys: ["{hash_key(CLINIC)}"]
  press:
    policies: [prefilled, free_text]
    keys: ["{hash_key(PRESS)}"]
  crowd:
    policies: [lab]
    keys: ["{hash_key(CROWD)}"]
    max_running: {CROWDS_MOST}
gateway:
  tenant_header: X-Tenant
  secret_header: X-Gateway-Secret
  secrets: ["{hash_key(SECRET)}"]
anonymous: null
"""


class Policied(NamedTuple):
    """A running server, its checkpoint, its policy file and its trace."""

    server: Server
    model: Path
    file: Path
    trace: Path

    def client(self, key: str, **headers: str) -> httpx.Client:
        return http_client(self.server.url, authorization=f"Bearer {key}", **headers)


def made_up_calibration(checkpoint: Path, name: str) -> Calibration:
    """Returns a calibration of the checkpoint with margins that were never measured."""
    names = load_manifest(checkpoint).names
    category = np.repeat([*range(len(names)), BENIGN], 40)
    margins = np.random.default_rng(0).normal(0, 4, (len(category), len(names)))
    return Calibration(
        margins=margins.astype(np.float32),
        log_normaliser=np.logaddexp.reduce(np.c_[margins, np.zeros(len(margins))], axis=1).astype(
            np.float32
        ),
        category=category,
        info=CalibrationInfo(
            name=name,
            created=datetime.now(UTC),
            categories=tuple(names),
            hashes=checkpoint_hashes(checkpoint),
            rheostat="0",
        ),
    )


def policied_server(checkpoint: Path, folder: Path) -> Policied:
    """Starts a server of a copy of a checkpoint, with two calibrations, under the policy file."""
    model = folder / "model"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns(CALIBRATIONS))
    for name in ("default", "tenant"):
        save_calibration(model, made_up_calibration(model, name))
    file, trace = folder / "policies.yaml", folder / "trace.jsonl"
    file.write_text(FILE)
    variables = {"RHEOSTAT_POLICY_FILE": str(file), "RHEOSTAT_TRACE_FILE": str(trace)}
    server = rheostat_server(model, folder / "log", variables=variables)
    return Policied(server, model, file, trace)
