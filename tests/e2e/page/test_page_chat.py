"""Chat with dials, in a real browser before the real server."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.e2e.calibrating import KEY, CalibratedServer, score
from tests.e2e.page.browser import Visit, visit
from tests.e2e.policied import ACME, CLINIC, GRADED_SENSITIVITY, Policied

LOCK = "How do I pick a lock?"
CHAT = "/v1/chat/completions"
SCORE = "/v1/refusal/score"
MINUS = "\u2212"
HOSTILE = '</script><img src=x onerror="window.hit=1">{{7*7}} \' " ; \u2028 \u202e ${x}'


def send(page: Page, text: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page: Page) -> None:
    """Returns when the last answer has ended."""
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_key_is_asked_for_and_a_wrong_one_is_said(
    browser: Browser, calibrated: CalibratedServer
) -> None:
    with visit(browser, calibrated.server.url, KEY) as opened:
        opened.page.reload()
        page = opened.page
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert").first).to_contain_text("no key that this server knows")
        assert KEY not in page.content()
        stored = opened.page.context.storage_state()
        assert (stored["cookies"], stored["origins"]) == ([], [])


def test_bars_are_the_servers_probabilities(opened: Visit, calibrated: CalibratedServer) -> None:
    page = opened.page
    page.get_by_label("Prompt", exact=True).press_sequentially(LOCK, delay=5)
    with calibrated.client() as client:
        decisions = score(client, [LOCK])["data"][0]["decisions"]
    for name, decision in decisions.items():
        meter = page.get_by_role("meter", name=name)
        expect(meter).to_have_attribute("aria-valuenow", re.compile(r"."))
        expect(meter).to_have_attribute("aria-valuenow", f"{decision['probability']:.3f}")
    # Typed letters are not requests.
    assert 1 <= len(opened.asked(SCORE)) <= 4


def test_dial_flips_the_prompt_where_the_page_says(opened: Visit) -> None:
    page = opened.page
    page.get_by_label("Prompt", exact=True).fill(LOCK)
    dial = page.get_by_label("Dial safety")
    flip = dial.get_by_role("button", name="flips at")
    flip.click()
    expect(page.locator("#verdict")).to_have_text("This prompt would be refused for safety.")
    bias = float(dial.locator(".readout").inner_text().split()[1].replace(MINUS, "-"))
    dial.get_by_label("what the dial says").select_option("bias")
    number = dial.get_by_role("spinbutton")
    for step, badge in ((0.1, "Refused · safety"), (-0.1, "Answered")):
        number.fill(f"{bias + step:.3f}")
        number.press("Enter")
        page.get_by_label("Prompt", exact=True).fill(LOCK)
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".badge").last).to_have_text(badge)
        answered(page)
        page.get_by_role("button", name="New chat").click()


# Counts the pieces of text that come in one after the other.
COUNTING = """log => {
  log.pieces = 0;
  new MutationObserver((changes) => {
    log.pieces += changes.filter((change) => change.target.matches(".assistant .text")).length;
  }).observe(log, { childList: true, subtree: true });
}"""


def test_answer_can_be_stopped(opened: Visit) -> None:
    page = opened.page
    waiting: list[Route] = []
    page.route(f"**{CHAT}", lambda route: waiting.append(route))
    send(page, "Hello")
    expect(page.locator(".badge")).to_have_text("Waiting…")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".badge")).to_have_text("Stopped")
    answered(page)
    page.unroute(f"**{CHAT}")
    page.get_by_role("button", name="Ask again").click()
    answered(page)
    expect(page.locator(".badge").last).to_have_text(re.compile("Answered|Refused"))


def test_answer_streams_with_its_decision_and_report(opened: Visit) -> None:
    page = opened.page
    page.locator("#log").evaluate(COUNTING)
    send(page, "What is the capital of France?")
    expect(page.locator(".badge")).to_have_text("Answered")
    answered(page)
    expect(page.locator(".turn.assistant .text")).not_to_be_empty()
    assert page.locator("#log").evaluate("log => log.pieces") > 2
    page.get_by_text("Margins and biases").click()
    row = page.get_by_role("row", name="safety")
    expect(row).to_contain_text("default")
    send(page, LOCK)
    answered(page)
    messages = opened.asked(CHAT)[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]


def test_refused_turn_is_sent_back_as_a_refusal(opened: Visit) -> None:
    page = opened.page
    page.locator("summary", has_text="System prompt").click()
    page.get_by_label("System prompt", exact=True).fill("Be brief.")
    opened.slider("safety").fill("1")
    send(page, "Hello")
    answered(page)
    expect(page.locator(".badge")).to_have_text("Refused · safety")
    page.get_by_label("Dial safety").get_by_role("button", name="default").click()
    send(page, "And now?")
    answered(page)
    system, first, refused, second = opened.asked(CHAT)[-1]["messages"]
    assert (system["role"], first["content"], second["content"]) == ("system", "Hello", "And now?")
    assert refused["content"] is None
    assert refused["refusal"]
    assert refused["refusal_category"] == "safety"
    assert "categories" not in opened.asked(CHAT)[-1]["refusal"]


def test_rate_is_solved_by_the_server(opened: Visit, calibrated: CalibratedServer) -> None:
    opened.choose_mode("safety", "rate")
    opened.choose_mode("humanizing", "rate")
    opened.slider("safety").fill("0.3")
    opened.slider("humanizing").fill("0.6")
    asked = {"safety": {"rate": 0.3}, "humanizing": {"rate": 0.6}}
    with calibrated.client() as client:
        refusal = {"categories": asked}
        decisions = score(client, [LOCK], refusal=refusal)["data"][0]["decisions"]
    for name in asked:
        shown = f"{decisions[name]['bias']:+.2f}".replace("-", MINUS)
        readout = opened.page.get_by_label(f"Dial {name}").locator(".readout")
        expect(readout).to_contain_text(f"bias {shown} ")


def test_bound_that_cannot_be_certified_is_said_at_its_dial(opened: Visit) -> None:
    opened.choose_mode("safety", "false_refusal_rate")
    number = opened.page.get_by_label("Dial safety").get_by_role("spinbutton")
    number.fill("0.001")
    number.press("Enter")
    note = opened.page.get_by_label("Dial safety").get_by_role("status")
    expect(note).to_contain_text("prompts")
    # The browser itself logs a request that is answered with 422.
    opened.problems[:] = [text for text in opened.problems if "422" not in text]


@pytest.mark.parametrize("text", [HOSTILE, "<b>bold</b>", "=1+1", "a" * 300])
def test_prompt_is_only_ever_text(opened: Visit, text: str) -> None:
    page = opened.page
    send(page, text)
    answered(page)
    expect(page.locator(".turn.user .text")).to_have_text(text, use_inner_text=False)
    assert page.locator(".log img, .log b, .log script").count() == 0


def test_models_output_is_only_ever_text(opened: Visit) -> None:
    page = opened.page
    delta = {"role": "assistant", "refusal": HOSTILE, "refusal_category": HOSTILE}
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": "stop"}]}

    def answer(route: Route) -> None:
        body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route(f"**{CHAT}", answer)
    send(page, "Hello")
    expect(page.locator(".turn.assistant .text")).to_have_text(HOSTILE)
    expect(page.locator(".badge")).to_contain_text("Refused")
    assert page.locator(".log img").count() == 0


def test_dead_server_is_said_and_the_page_goes_on_when_it_is_back(opened: Visit) -> None:
    page = opened.page
    page.get_by_label("Prompt", exact=True).fill(LOCK)
    expect(page.locator("#verdict")).to_contain_text("would be")
    page.context.set_offline(True)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".badge")).to_have_text("Failed")
    expect(page.locator(".turn.assistant")).to_contain_text("The server does not answer")
    page.context.set_offline(False)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".badge").last).to_have_text(re.compile("Answered|Refused"))
    answered(page)
    opened.problems[:] = [text for text in opened.problems if "ERR_INTERNET" not in text]


def test_floor_is_hatched_and_the_slider_stops_there(browser: Browser, policied: Policied) -> None:
    with visit(browser, policied.server.url, CLINIC) as opened:
        slider = opened.slider("safety")
        slider.fill("0.1")
        expect(slider).to_have_value(re.compile(f"{GRADED_SENSITIVITY}"))
        dial = opened.page.get_by_label("Dial safety")
        expect(dial.get_by_role("status")).to_contain_text("At the floor of graded")
        share = dial.locator(".forbidden").first.evaluate(
            "node => node.clientWidth / node.parentNode.clientWidth"
        )
        assert share == pytest.approx(GRADED_SENSITIVITY, abs=0.01)
        number = dial.get_by_role("spinbutton")
        number.fill("0.2")
        number.press("Enter")
        expect(number).to_have_value(f"{GRADED_SENSITIVITY}")
        slider.press("End")
        expect(slider).to_have_value("1")
        opened.page.get_by_label("Policy", exact=True).select_option("lab")
        expect(slider).to_have_value("0")
        expect(dial.locator(".note")).to_be_empty()
        assert opened.problems == []


def test_policy_without_reports_is_said_and_chat_goes_on(
    browser: Browser, policied: Policied
) -> None:
    with visit(browser, policied.server.url, ACME) as opened:
        page = opened.page
        page.get_by_label("Policy", exact=True).select_option("kiosk")
        before = len(opened.asked(SCORE))
        page.get_by_label("Prompt", exact=True).fill("Hello")
        expect(page.locator("#verdict")).to_contain_text("kiosk allows no reports")
        page.keyboard.press("Enter")
        expect(page.locator(".badge")).to_have_text("Refused · safety")
        answered(page)
        assert opened.asked(CHAT)[-1]["refusal"] == {"policy": "kiosk"}
        assert len(opened.asked(SCORE)) == before
        assert opened.problems == []


def test_copied_policies_are_accepted(
    opened: Visit, calibrated: CalibratedServer, tmp_path: Path
) -> None:
    opened.slider("safety").fill("0.8")
    opened.choose_mode("humanizing", "rate")
    opened.slider("humanizing").fill("0.4")
    for name in ("defaults", "floors"):
        file = tmp_path / f"{name}.yaml"
        file.write_text(copied(opened.page, name))
        command = [sys.executable, "-m", "rheostat", "policy", "check", str(file)]
        checked = subprocess.run(command, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
        assert "safety" in file.read_text()


def test_new_user_finds_the_dial_and_takes_its_policy_away(
    opened: Visit, checkpoint: Path, tmp_path: Path
) -> None:
    page = opened.page
    page.get_by_role("button", name=LOCK).click()
    dial = page.get_by_label("Dial safety")
    dial.get_by_role("button", name="flips at").click()
    expect(page.locator("#verdict")).to_have_text("This prompt would be refused for safety.")
    file = tmp_path / "policies.yaml"
    file.write_text(copied(page, "floors"))
    command = [sys.executable, "-m", "rheostat", "policy", "check", str(file)]
    checked = subprocess.run(
        [*command, "--model", str(checkpoint)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert re.search(r"from-the-page.safety: biases from \d", checked.stdout)


def test_copied_requests_run(opened: Visit, calibrated: CalibratedServer, tmp_path: Path) -> None:
    opened.slider("safety").fill("1")
    opened.page.get_by_label("Prompt", exact=True).fill('It\'s a "quoted" $HOME `x` \\ prompt')
    environment = {"RHEOSTAT_KEY": KEY, "PATH": "/usr/bin:/bin"}
    script = tmp_path / "request.sh"
    script.write_text(copied(opened.page, "curl"))
    told = run(["sh", str(script)], environment)
    assert json.loads(told)["choices"][0]["message"]["refusal_category"] == "safety"
    program = tmp_path / "request.py"
    program.write_text(copied(opened.page, "python"))
    assert run([sys.executable, str(program)], environment).strip()


def copied(page: Page, name: str) -> str:
    page.get_by_role("button", name="Copy as").click()
    page.get_by_label("Format").select_option(name)
    text = page.locator("#copy-code").inner_text()
    page.get_by_role("button", name="Close").click()
    assert KEY not in text
    return text + "\n"


def run(command: list[str], environment: dict[str, str]) -> str:
    done: Any = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)
