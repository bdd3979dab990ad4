"""The page's own arithmetic, in the browser, against the server's in Python."""

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser, Page
from scipy.stats import binomtest

from models.controls import Controls, Rule, dial_row
from models.decision import Dials, decide
from tests.e2e.page.browser import visit
from tests.e2e.servers import Server

K = 4
ROWS = 400
WORDS = {math.inf: "always", -math.inf: "never"}


@pytest.fixture(scope="module")
def page(browser: Browser, server: Server) -> Iterator[Page]:
    # Playwright's evaluate() needs eval, which the page itself forbids.
    with visit(browser, server.url, bypass_csp=True) as opened:
        yield opened.page


def evaluate(page: Page, module: str, body: str, argument: Any) -> Any:
    script = f"async (given) => {{ const m = await import('/page/{module}'); {body} }}"
    return page.evaluate(script, argument)


def decided(margins: np.ndarray[Any, Any], biases: tuple[float, ...]) -> list[int]:
    controls = Controls(Rule.GREEDY, biases, (True,) * K)
    row = dial_row(controls.bias, controls.selected, Rule.GREEDY, 0.0, 0.0)
    logits = torch.tensor(np.c_[margins, np.zeros(len(margins))], dtype=torch.float32)
    dials = Dials(torch.tensor([row] * len(margins), dtype=torch.float32), K)
    chosen = decide(logits, dials, {Rule.GREEDY}).tolist()
    return [-1 if choice == K else choice for choice in chosen]


@pytest.mark.parametrize("seed", range(6))
def test_decisions_are_the_servers_with_ties_and_infinities(page: Page, seed: int) -> None:
    generator = np.random.default_rng(seed)
    margins = generator.normal(0, 3, (ROWS, K)).astype(np.float32)
    margins[::3] = np.round(margins[::3])  # many ties, also with the respond token
    pool = [-math.inf, math.inf, -2.0, -1.0, 0.0, 1.0, 0.1, 2.7182818]
    for _ in range(20):
        biases = tuple(float(b) for b in generator.choice(pool[seed % 3 :], K))
        told = [WORDS.get(bias, bias) for bias in biases]
        given = {"margins": margins.ravel().tolist(), "biases": told}
        body = """
            const words = {always: Infinity, never: -Infinity};
            const biases = given.biases.map((b) => words[b] ?? b);
            return Array.from(m.decideAll(Float32Array.from(given.margins), biases));
        """
        assert evaluate(page, "decision.js", body, given) == decided(margins, biases)


def test_flip_lies_where_the_decision_changes(page: Page) -> None:
    generator = np.random.default_rng(0)
    margins = generator.normal(0, 3, (ROWS, K)).astype(np.float32)
    biases = (0.5, -1.0, 0.0, 2.0)
    body = """
        return given.map((row) => m.flipOf(Float32Array.from(row), [0.5, -1, 0, 2], 1));
    """
    for row, flip in zip(
        margins, evaluate(page, "decision.js", body, margins.tolist()), strict=True
    ):
        for step, expected in ((-1e-3, flip["below"]), (1e-3, 1)):
            moved = (biases[0], flip["bias"] + step, *biases[2:])
            assert decided(row[None], moved) == [expected]


def test_wilson_is_scipys(page: Page) -> None:
    cases = [[0, 1], [1, 1], [0, 40], [3, 40], [20, 40], [40, 40], [137, 10_000]]
    body = "return given.map(([count, n]) => m.wilson(count, n));"
    for (count, n), (low, high) in zip(
        cases, evaluate(page, "statistics.js", body, cases), strict=True
    ):
        expected = binomtest(count, n).proportion_ci(0.95, method="wilson")
        assert (low, high) == (pytest.approx(expected.low), pytest.approx(expected.high))


@pytest.mark.parametrize(
    "records",
    [
        [["prompt", "category"], ["Hi, there", "safety"], ['Say "no"', ""]],
        [["prompt", "label"], ["two\nlines", "a"], ["two\r\nlines", "b"], ["=1+1", "c"]],
        [["prompt"], ["ünï ☕"], ["  spaces  "]],
    ],
)
def test_csv_is_read_as_pythons_writer_writes_it(page: Page, records: list[list[str]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(records)
    body = "return m.parseCsv(given);"
    assert evaluate(page, "reading.js", body, text.getvalue()) == records


def test_written_csv_is_read_back_and_holds_no_formula(page: Page) -> None:
    body = "return m.writeCsv(given);"
    records: list[list[Any]] = [["prompt", "margin"], ['=cmd|"x"', -1.5], ["a,b\nc", 2]]
    written = evaluate(page, "reading.js", body, records)
    read = list(csv.reader(io.StringIO(written, newline="")))
    assert read == [["prompt", "margin"], ['\'=cmd|"x"', "-1.5"], ["a,b\nc", "2"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no prompts"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON"),
        ('{"category": "safety"}', "line 1 has no prompt"),
        ("colour,size\nred,1\n", "must name the columns"),
        ('prompt,category\n"open', "never closed"),
        ("[1]", "entry 1 is no object"),
    ],
)
def test_file_that_cannot_be_read_says_where(page: Page, text: str, said: str) -> None:
    body = "try { m.readPrompts(given); } catch (error) { return error.message; }"
    assert said in evaluate(page, "reading.js", body, text)


def test_rows_are_read_with_their_labels(page: Page) -> None:
    text = '{"prompt": "a", "category": null}\n\n{"text": "b", "label": "safety"}\n'
    body = """
        return m.readPrompts(given).map((row) => [row.prompt, m.labelIndex(row.label, ["safety"])]);
    """
    assert evaluate(page, "reading.js", body, text) == [["a", 1], ["b", 0]]
