"""The page in a real headless Chromium."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from playwright.sync_api import Browser, Page, Request, sync_playwright

NO_BROWSER = "the page's tests run a real Chromium: apt-get install chromium (`make setup` does)"
# The container's root has no user namespaces for Chromium's own sandbox.
FLAGS = ["--no-sandbox"]


@contextmanager
def chromium() -> Iterator[Browser]:
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    assert binary is not None, NO_BROWSER
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """An opened page, and what it did that a page should not.

    Attributes:
        page: The browser's.
        url: The server's.
        requests: Every request that the page made.
        problems: Console errors and uncaught exceptions.
    """

    page: Page
    url: str
    requests: list[Request] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def asked(self, path: str) -> list[dict[str, Any]]:
        """Returns the bodies that were sent to a route."""
        bodies: list[Any] = [r.post_data_json for r in self.requests if r.url == self.url + path]
        return bodies

    def foreign(self) -> list[str]:
        """Returns requests that left the origin."""
        own = (self.url + "/", f"blob:{self.url}/")
        return [r.url for r in self.requests if not r.url.startswith(own)]

    def slider(self, category: str) -> Any:
        return self.page.get_by_label(f"Dial {category}").get_by_role("slider")

    def choose_mode(self, category: str, mode: str) -> None:
        self.page.get_by_label(f"{category}: what the dial says").select_option(mode)


@contextmanager
def visit(browser: Browser, url: str, key: str | None = None, **options: Any) -> Iterator[Visit]:
    """Opens the page of a server; every visit is a new profile.

    Args:
        browser: Where.
        url: The server's.
        key: What is typed where the page asks for a key.
        options: Of the browser's context.
    """
    options = {"viewport": {"width": 1360, "height": 860}, **options}
    context = browser.new_context(**options)
    opened = Visit(context.new_page(), url)
    opened.page.set_default_timeout(20_000)
    opened.page.on("request", lambda request: opened.requests.append(request))
    opened.page.on(
        "console", lambda m: opened.problems.append(m.text) if m.type == "error" else None
    )
    opened.page.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.page.goto(url)
    if key is not None:
        opened.page.get_by_label("API key").fill(key)
        opened.page.get_by_role("button", name="Go on").first.click()
        # The answer that asks for the key is an error of the network to the browser's console.
        opened.page.get_by_role("heading", name="Dials").wait_for()
        opened.problems[:] = [text for text in opened.problems if "401" not in text]
    opened.page.get_by_role("heading", name="Dials").wait_for()
    yield opened
    context.close()
