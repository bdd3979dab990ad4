"""Policy files for tests, and the books that are made of them for the small manifest."""

from pathlib import Path

from starlette.datastructures import Headers

from server.policies.book import PolicyBook
from server.policies.credentials import hash_key
from server.policies.loading import Served, load_policies
from tests.server.boards import calibrations
from tests.server.manifests import MANIFEST

ACME_KEY = "acme-key-acme-key-acme-key"
SHOP_KEY = "shop-key-shop-key-shop-key"
SECRET = "gateway-secret-gateway-secret"

TWO_TENANTS = f"""\
policies:
  desk:
    defaults: {{categories: {{safety: 0.9}}}}
    floors: {{safety: 0.8}}
    report: true
  lab:
    defaults: {{report: true}}
  kiosk:
    floors: {{humanizing: 0.5}}
    outside: refuse
    enforce: false
    report: true
tenants:
  acme:
    policies: [desk, lab]
    keys: ["{hash_key(ACME_KEY)}"]
  shop:
    policies: [kiosk]
    keys: ["{hash_key(SHOP_KEY)}"]
    header: shop-1
gateway:
  tenant_header: X-Tenant
  secret_header: X-Gateway-Secret
  secrets: ["{hash_key(SECRET)}"]
"""


def served(*names: str) -> Served:
    """Returns the small manifest's checkpoint with the named calibrations."""
    return Served(MANIFEST, calibrations(*names))


def book(folder: Path, text: str = TWO_TENANTS, *names: str) -> PolicyBook:
    """Returns the book of a policy file, with the named calibrations loaded."""
    path = folder / "policies.yaml"
    path.write_text(text)
    return load_policies(path, served(*names))


def headers(**sent: str) -> Headers:
    """Returns request headers; underscores stand for dashes."""
    return Headers({name.replace("_", "-"): value for name, value in sent.items()})
