"""The example policy file is what docs/policies.md says it is."""

import json
import re
from pathlib import Path

from models.manifest import Category, ControlToken, Manifest
from server.dials.calibrations import Calibrations
from server.policies.book import PolicyBook
from server.policies.file import GatewayEntry, PolicyEntry, PolicyFile, TenantEntry
from server.policies.loading import Served, load_policies
from tests.server.policybooks import headers
from training.config.recipe import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "policies.md").read_text()
ACME = "example-key-of-acme-do-not-use-it"
GATEWAY = "example-secret-do-not-use-it"


def example() -> PolicyBook:
    """Returns the example's policies for the categories of the demo."""
    names = list(load_config(Path("demo")).categories)
    manifest = Manifest(
        respond=ControlToken(token="[respond]", id=0),
        categories=tuple(
            Category(name=name, token=f"[refuse:{name}]", id=place)
            for place, name in enumerate(names, 1)
        ),
    )
    return load_policies(ROOT / "examples" / "policies.yaml", Served(manifest, Calibrations({})))


def test_example_is_valid_and_its_keys_are_those_of_the_page() -> None:
    book = example()
    assert book.caller(headers(authorization=f"Bearer {ACME}")).tenant == "acme"
    assert book.caller(headers(x_tenant="shop", x_gateway_secret=GATEWAY)).tenant == "shop"
    assert ACME in PAGE
    assert book.anonymous is None


def test_every_field_of_the_file_stands_in_the_table_and_no_other() -> None:
    rows = re.findall(r"^\| `((?:policies|tenants|gateway|anonymous).*?)` \|", PAGE, re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"(\w+)(?:`|$|,)", row)}
    told |= set(re.findall(r"`\.(\w+)`", PAGE))
    fields = {
        *PolicyEntry.model_fields,
        *TenantEntry.model_fields,
        *GatewayEntry.model_fields,
        *(PolicyFile.model_fields.keys() - {"version", "policies", "tenants", "gateway"}),
    }
    assert told == fields


def test_trace_line_of_the_page_has_the_fields_of_a_trace_line() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    line = json.loads(block)
    assert list(line) == [
        "time",
        "request_id",
        "choice",
        "route",
        "tenant",
        "policy",
        "enforce",
        "asked",
        "effective",
        "clamped",
        "decision",
        "category",
    ]
