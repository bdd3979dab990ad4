"""Takes the screenshots of README and docs/page.md: `make screenshots`.

They show the demo's checkpoint behind a real server, with a calibration that is measured first.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect

from models.calibration import CALIBRATIONS
from tests.e2e.calibrating import calibrate, calibration_prompts
from tests.e2e.page.browser import chromium, visit
from tests.e2e.servers import rheostat_server
from training.config.recipe import load_config
from training.demo_data.render import write
from training.run.train import train

ROOT = Path(__file__).parents[3]
OUT = ROOT / "docs" / "page"
CHECKPOINT = ROOT / "checkpoints" / "demo"
# The demo's model is not sure of it, so that dials have something to turn.
PROMPT = "What is the best way to open the lock of the school as a little joke?"
FLOORS = """\
policies:
  support-desk:
    floors: {safety: 0.8}
    ceilings: {humanizing: 0.6}
    defaults: {categories: {safety: 0.9}}
    report: true
anonymous: support-desk
"""


def main() -> None:
    """Measures a calibration, serves it under a policy and takes every picture."""
    train(load_config(Path("demo")), CHECKPOINT, replace_stale=True)
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made, chromium() as browser:
        folder = Path(made)
        policies = folder / "policies.yaml"
        policies.write_text(FLOORS)
        model = _calibrated(folder)
        variables = {"RHEOSTAT_POLICY_FILE": str(policies)}
        with rheostat_server(model, folder / "server.log", variables=variables) as server:
            _chat(browser, server.url, "chat", color_scheme="light")
            _chat(browser, server.url, "chat-dark", color_scheme="dark")
            _set(browser, server.url)
            _phone(browser, server.url)


def _calibrated(folder: Path) -> Path:
    model = folder / "demo"
    shutil.copytree(CHECKPOINT, model, ignore=shutil.ignore_patterns(CALIBRATIONS))
    write(folder, seed=0)
    with rheostat_server(model, folder / "calibrating.log") as server:
        calibrate(server, model, calibration_prompts(folder / "calibration.jsonl"))
    return model


def _chat(browser: Browser, url: str, name: str, **options: Any) -> None:
    with visit(browser, url, **options) as opened:
        page = opened.page
        _ask(page, PROMPT)
        page.locator(".turn.assistant summary").last.click()
        _save(page, name)


def _set(browser: Browser, url: str) -> None:
    with visit(browser, url) as opened:
        page = opened.page
        page.get_by_role("tab", name="Prompt set").click()
        page.get_by_role("button", name="Take the demo").click()
        expect(page.locator("#results")).to_be_visible(timeout=60_000)
        opened.slider("safety").fill("0.99")
        page.get_by_label("Flipped").select_option("any")
        _save(page, "set")


def _phone(browser: Browser, url: str) -> None:
    with visit(browser, url, viewport={"width": 390, "height": 844}) as opened:
        _ask(opened.page, PROMPT)
        opened.page.get_by_role("button", name="Show").click()
        _save(opened.page, "phone")


def _ask(page: Page, text: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(text)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def _save(page: Page, name: str) -> None:
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)
    page.screenshot(path=OUT / f"{name}.png")


if __name__ == "__main__":
    main()
