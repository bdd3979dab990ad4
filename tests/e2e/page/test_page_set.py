"""A set of prompts: scored once, recomputed in the browser at every movement of a dial."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect
from scipy.stats import binomtest

from tests.e2e.calibrating import KEY, CalibratedServer, score
from tests.e2e.page.browser import Visit, visit
from tests.e2e.policied import ACME, Policied

SCORE = "/v1/refusal/score"
HOSTILE = '<img src=x onerror="window.hit=1">'
MANY = 10_000
FRAME_MS = 50.0


def take(page: Page, file: Path) -> None:
    page.get_by_role("tab", name="Prompt set").click()
    page.locator("#file").set_input_files(str(file))
    expect(page.locator("#results")).to_be_visible(timeout=60_000)


def saved(page: Page, button: str, folder: Path) -> str:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=button).click()
    path = folder / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path.read_text()


@pytest.fixture
def labelled(calibrated: CalibratedServer, tmp_path: Path) -> Path:
    """A CSV file with a hostile name, of prompts and labels of the calibration."""
    file = tmp_path / "<b>set&amp;.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["prompt", "category"])
        for category in (None, "safety", "humanizing"):
            for text in calibrated.texts(category)[:30]:
                writer.writerow([text, category or "benign"])
        writer.writerow([HOSTILE, HOSTILE])
    return file


def test_tables_are_the_servers_decisions_and_move_without_a_request(
    opened: Visit, calibrated: CalibratedServer, labelled: Path, tmp_path: Path
) -> None:
    page = opened.page
    take(page, labelled)
    expect(page.locator("#progress-text")).to_have_text(f"{labelled.name}: 91 prompts scored")
    expect(page.locator("#results .note")).to_contain_text("no category")
    asked = len(opened.requests)
    opened.slider("safety").fill("0.95")
    refusal = {"categories": {"safety": 0.95}}
    with calibrated.client() as client:
        entries = score(client, calibrated.texts("safety")[:30], refusal=refusal)["data"]
        benign = score(client, calibrated.texts(None)[:30], refusal=refusal)["data"]
    refused = sum(entry["refused"] for entry in entries)
    false = sum(entry["category"] == "safety" for entry in benign)
    row = page.locator("#results table").first.get_by_role("row", name="safety")
    expect(row.get_by_role("cell").nth(1)).to_have_text(percent(refused / 30))
    low, high = binomtest(refused, 30).proportion_ci(method="wilson")
    interval = f"{low * 100:.0f}\u2013{high * 100:.0f} %"
    expect(row.get_by_role("cell").nth(2)).to_have_text(interval)
    expect(row.get_by_role("cell").nth(4)).to_have_text(percent(false / 30))
    assert len(opened.requests) == asked
    exported = json.loads(saved(page, "Export JSON", tmp_path))
    assert exported["biases"]["safety"] == pytest.approx(2.944438979)
    flips = sum(entry["decision"] != entry["compared"] for entry in exported["prompts"])
    assert flips > 0
    expect(page.locator(".comparison .verdict")).to_contain_text(f"{flips} flipped")


def percent(share: float) -> str:
    digits = 1 if 0 < share < 0.1 else 0
    return f"{share * 100:.{digits}f} %"


def test_list_is_filtered_sorted_and_exported(
    opened: Visit, labelled: Path, tmp_path: Path
) -> None:
    page = opened.page
    take(page, labelled)
    page.get_by_label("Label", exact=True).select_option(label="safety")
    expect(page.get_by_text("30 of 91")).to_be_visible()
    page.get_by_role("button", name="p(refuse)").click()
    expect(page.get_by_role("columnheader", name="p(refuse)")).to_have_attribute(
        "aria-sort", "descending"
    )
    rows = list(csv.DictReader(saved(page, "Export CSV", tmp_path).splitlines()))
    assert len(rows) == 30
    best = [max(float(v) for k, v in row.items() if k.startswith("margin_")) for row in rows]
    assert best == sorted(best, reverse=True)
    page.get_by_label("Label", exact=True).select_option("")
    page.get_by_label("Search prompts").fill("<IMG")
    expect(page.get_by_text("1 of 91")).to_be_visible()
    cell = page.get_by_role("table", name="Prompts").get_by_role("cell").nth(1)
    expect(cell).to_have_text(HOSTILE)
    page.get_by_role("button", name=HOSTILE).click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(HOSTILE)
    assert page.locator("main img").count() == 0


def test_dropped_file_is_taken(opened: Visit) -> None:
    opened.page.get_by_role("tab", name="Prompt set").click()
    dropped = opened.page.evaluate_handle(DROPPED, '{"prompt": "Hello"}')
    opened.page.locator("#set").dispatch_event("drop", {"dataTransfer": dropped})
    expect(opened.page.locator("#progress-text")).to_have_text("dropped.jsonl: 1 prompts scored")


DROPPED = """(text) => {
  const dropped = new DataTransfer();
  dropped.items.add(new File([text], "dropped.jsonl"));
  return dropped;
}"""


def test_two_sets_of_dials_are_compared(opened: Visit, labelled: Path) -> None:
    page = opened.page
    take(page, labelled)
    opened.slider("safety").fill("0")
    page.get_by_role("button", name="Pin these dials").click()
    expect(page.locator(".comparison .verdict")).to_have_text("No prompt flips.")
    opened.slider("safety").fill("1")
    expect(page.locator(".comparison .verdict")).to_contain_text("newly refused")
    page.get_by_label("Flipped").select_option("answered")
    expect(page.get_by_text("0 of 91")).to_be_visible()
    page.get_by_label("Compare with").select_option("trained")
    page.get_by_role("button", name="Reset all").click()
    expect(page.locator(".comparison .verdict")).to_have_text("No prompt flips.")
    page.get_by_label("Compare with").select_option("pinned")
    expect(page.locator(".comparison .verdict")).to_contain_text("newly refused")


def test_demos_prompts_are_at_hand_and_scoring_can_be_stopped_and_go_on(opened: Visit) -> None:
    page = opened.page
    page.get_by_role("tab", name="Prompt set").click()
    page.get_by_role("button", name="Take the demo").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#progress-text")).to_have_text(
        "The demo's prompts: 600 prompts scored", timeout=60_000
    )


def test_dead_server_leaves_what_was_scored(opened: Visit, labelled: Path) -> None:
    page = opened.page
    page.get_by_role("tab", name="Prompt set").click()
    page.context.set_offline(True)
    page.locator("#file").set_input_files(str(labelled))
    expect(page.locator("#set-note")).to_contain_text("does not answer")
    page.context.set_offline(False)
    page.get_by_role("button", name="Go on").click()
    expect(page.locator("#results")).to_be_visible()
    opened.problems[:] = [text for text in opened.problems if "ERR_INTERNET" not in text]


def test_prompt_that_the_server_refuses_is_left_out_and_told(opened: Visit, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    texts = ["Hello", "word " * 2000, "What is 2 plus 2?"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    take(opened.page, file)
    expect(opened.page.locator("#results .note")).to_contain_text(
        "1 left out, the first is number 2"
    )
    opened.problems[:] = [text for text in opened.problems if "400" not in text]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("a.csv", "x,y\n1,2\n", "must name the columns"), ("<i>.jsonl", "{", "line 1 is not JSON")],
)
def test_file_that_cannot_be_read_is_said(
    opened: Visit, tmp_path: Path, name: str, text: str, said: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    opened.page.get_by_role("tab", name="Prompt set").click()
    opened.page.locator("#file").set_input_files(str(file))
    expect(opened.page.locator("#set-note")).to_contain_text(f"{name}: ")
    expect(opened.page.locator("#set-note")).to_contain_text(said)


def test_policy_without_reports_scores_no_set(browser: Browser, policied: Policied) -> None:
    with visit(browser, policied.server.url, ACME) as opened:
        page = opened.page
        page.get_by_label("Policy", exact=True).select_option("kiosk")
        page.get_by_role("tab", name="Prompt set").click()
        page.get_by_role("button", name="Take the demo").click()
        expect(page.locator("#set-note")).to_contain_text("allows no reports")


def test_ten_thousand_prompts_stay_smooth(opened: Visit, tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"Prompt {i}"}) + "\n" for i in range(MANY)))
    names = opened.page.locator(".dial h3").all_inner_texts()

    def answer(route: Route) -> None:
        body: Any = route.request.post_data_json
        data = [{"decisions": made_up(names, entry)} for entry in body["inputs"]]
        route.fulfill(status=200, content_type="application/json", body=json.dumps({"data": data}))

    opened.page.route(f"**{SCORE}", answer)
    take(opened.page, file)
    opened.page.get_by_role("button", name="p(refuse)").click()
    frames = opened.slider("safety").evaluate(MOVING)
    # Not the median: whatever else the machine does lengthens some frames.
    assert sorted(frames)[len(frames) // 4] < FRAME_MS, frames
    assert opened.page.locator(".list .row").count() < 100


# How long the page's own work of one frame takes while a slider moves.
MOVING = """async (slider) => {
  const frames = [];
  for (let step = 1; step < 40; step++) {
    slider.value = step / 40;
    slider.dispatchEvent(new Event("input"));
    frames.push(await new Promise((done) => {
      let begin = 0;
      requestAnimationFrame(() => { setTimeout(() => done(performance.now() - begin)); });
      begin = performance.now();
    }));
  }
  return frames;
}"""


def made_up(names: list[str], entry: dict[str, Any]) -> dict[str, Any]:
    number = int(entry["messages"][0]["content"].split()[-1])
    return {name: {"margin": ((number * (7 + c)) % 97) / 8 - 9} for c, name in enumerate(names)}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1360, 390])
def test_axe_finds_nothing(
    browser: Browser, calibrated: CalibratedServer, labelled: Path, scheme: Any, width: int
) -> None:
    viewport = {"width": width, "height": 860}
    # axe is a script of another origin, which the page itself forbids.
    options = {"viewport": viewport, "color_scheme": scheme, "bypass_csp": True}
    with visit(browser, calibrated.server.url, KEY, **options) as opened:
        page = opened.page
        page.get_by_label("Prompt", exact=True).fill("How do I pick a lock?")
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.get_by_text("Margins and biases").click()
        if width < 900:
            page.get_by_role("button", name="Show").click()
        assert violations(page) == []
        page.get_by_role("button", name="Copy as").click()
        assert violations(page) == []
        page.get_by_role("button", name="Close").click()
        take(page, labelled)
        assert violations(page) == []


def violations(page: Page) -> list[Any]:
    found = Axe().run(page).response["violations"]
    return [(v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found]
