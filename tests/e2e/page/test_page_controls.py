"""Keyboard, theme, width, policies: what of the page is neither chat nor a set."""

import re

import pytest
from playwright.sync_api import Browser, expect

from tests.e2e.calibrating import KEY, CalibratedServer
from tests.e2e.page.browser import Visit, visit
from tests.e2e.policied import ACME, SHOP, Policied
from tests.e2e.servers import Server


def test_page_is_used_by_keyboard_alone(opened: Visit) -> None:
    page = opened.page
    link = page.get_by_role("link", name="To the content")
    link.focus()
    link.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    chat = page.get_by_role("tab", name="Chat")
    chat.focus()
    chat.press("ArrowRight")
    tab = page.get_by_role("tab", name="Prompt set")
    expect(tab).to_be_focused()
    expect(tab).to_have_attribute("aria-selected", "true")
    expect(page.get_by_role("tabpanel", name="Prompt set")).to_be_visible()
    tab.press("ArrowRight")
    expect(page.get_by_role("tabpanel", name="Chat")).to_be_visible()
    slider = opened.slider("safety")
    slider.press("ArrowRight")
    expect(slider).to_have_value(re.compile(r"^0\.51"))
    expect(slider).to_have_attribute("aria-valuetext", re.compile(r"0\.510, bias \+0\.04"))
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.press_sequentially("one")
    prompt.press("Shift+Enter")
    prompt.press_sequentially("two")
    expect(prompt).to_have_value("one\ntwo")
    page.get_by_role("button", name="Copy as").press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.parametrize(("scheme", "theme"), [("light", "dark"), ("dark", "light")])
def test_theme_follows_the_system_until_it_is_chosen(
    browser: Browser, calibrated: CalibratedServer, scheme: str, theme: str
) -> None:
    with visit(browser, calibrated.server.url, KEY, color_scheme=scheme) as opened:
        body = opened.page.locator("body")
        before = body.evaluate("node => getComputedStyle(node).backgroundColor")
        opened.page.get_by_label("Theme").select_option(theme)
        after = body.evaluate("node => getComputedStyle(node).backgroundColor")
        assert before != after
        assert opened.problems == []


@pytest.mark.parametrize("tab", ["Chat", "Prompt set"])
def test_phone_needs_no_sideways_scrolling(
    browser: Browser, calibrated: CalibratedServer, tab: str
) -> None:
    with visit(
        browser, calibrated.server.url, KEY, viewport={"width": 360, "height": 740}
    ) as opened:
        page = opened.page
        page.get_by_role("tab", name=tab).click()
        expect(opened.slider("safety")).to_be_hidden()
        page.get_by_role("button", name="Show").click()
        expect(opened.slider("safety")).to_be_visible()
        overflow = "node => node.scrollWidth - node.clientWidth"
        assert page.locator("html").evaluate(overflow) == 0


def test_rates_are_offered_only_with_a_calibration(browser: Browser, server: Server) -> None:
    with visit(browser, server.url) as opened:
        modes = opened.page.get_by_label("safety: what the dial says").get_by_role("option")
        assert modes.all_inner_texts() == ["Sensitivity", "Bias"]
        expect(opened.page.locator("#policy-note")).to_contain_text("No calibration")
        assert opened.problems == []


def test_shadow_and_strict_policies_are_said(browser: Browser, policied: Policied) -> None:
    with visit(browser, policied.server.url, ACME) as opened:
        opened.page.get_by_label("Policy", exact=True).select_option("trial")
        expect(opened.page.locator("#policy-note")).to_contain_text("Shadow")
        opened.page.get_by_label("Prompt", exact=True).fill("Hello")
        opened.page.keyboard.press("Enter")
        expect(opened.page.locator(".badge")).to_have_text("Answered · would be refused for safety")
    with visit(browser, policied.server.url, SHOP) as opened:
        expect(opened.page.locator("#policy-note")).to_contain_text("refused with 403")
        expect(opened.page.locator("#policy-choice")).to_be_hidden()


def test_everything_asked_for_lies_on_the_server(opened: Visit) -> None:
    assert opened.foreign() == []
    paths = {request.url.removeprefix(opened.url) for request in opened.requests}
    assert {"/", "/page/app.js", "/page/theme.css", "/v1/refusal/policies"} <= paths
