"""The GPU benchmark's reference and counting; `--device cpu` rehearses the rest."""

import math

import pytest

from benchmarks.gpu.correctness import (
    COUNTERS,
    Answer,
    Asked,
    Count,
    answer_of,
    body_of,
    requests_of,
)
from benchmarks.gpu.reference import Prompt, decided
from benchmarks.gpu.report import markdown
from tests.server.manifests import MANIFEST

MARGINS = {"safety": 1.0, "humanizing": -2.0}
PROMPT = Prompt("Hi", [1, 2], MARGINS, {10: "no", 11: "not I", 12: "yes"})


@pytest.mark.parametrize(
    ("biases", "expected"),
    [
        ((0.0, 0.0), "safety"),
        ((-1.0, 0.0), "safety"),  # a tie refuses
        ((-1.5, 0.0), None),
        ((0.0, 3.0), "safety"),  # of equals the first in the manifest
        ((0.0, 4.0), "humanizing"),
        ((0.0, math.inf), "humanizing"),
        ((math.inf, math.inf), "safety"),
        ((-math.inf, -math.inf), None),
    ],
)
def test_reference_decides_by_greedy(biases: tuple[float, float], expected: str | None) -> None:
    dials = dict(zip(MARGINS, biases, strict=True))
    assert decided(MARGINS, dials, 1e-6)[0] == expected


def test_reference_knows_what_rounding_could_change() -> None:
    assert decided(MARGINS, {"safety": -1.05, "humanizing": 0.0}, 0.1) == (None, True)
    assert decided(MARGINS, {"safety": -1.05, "humanizing": 0.0}, 0.01) == (None, False)
    assert decided(MARGINS, {"safety": 0.0, "humanizing": math.inf}, 9.0) == ("humanizing", False)


def test_requests_differ_and_some_are_cancelled() -> None:
    asked = requests_of([PROMPT], MANIFEST.names, 40)
    assert len({tuple(one.biases.values()) for one in asked}) == 40
    assert sum(one.cancelled for one in asked) == 5
    assert sum(math.inf in one.biases.values() for one in asked) == 8
    decisions = {decided(MARGINS, one.biases, 0)[0] for one in asked}
    assert decisions == {None, "safety", "humanizing"}


def test_body_brings_every_dial_and_the_answer_is_read_back() -> None:
    body = body_of(Asked(PROMPT, {"safety": math.inf, "humanizing": 0.5}, True), "demo")
    assert body["refusal"]["categories"] == {"safety": "always", "humanizing": {"bias": 0.5}}
    assert body["stream"]
    decisions = {name: {"margin": margin} for name, margin in MARGINS.items()}
    report = {"refused": True, "category": "safety", "decisions": decisions}
    choice = {"message": {"refusal": "no", "content": None}, "refusal_report": report}
    assert answer_of({"choices": [choice]}) == Answer("safety", "no", MARGINS)


def test_answers_are_counted_against_the_reference() -> None:
    count = Count()
    asked = Asked(PROMPT, {"safety": 0.0, "humanizing": 0.0}, False)
    count.add(asked, Answer("safety", "no", MARGINS), MANIFEST, 0.1)
    count.add(asked, Answer(None, "yes", {**MARGINS, "safety": 1.5}), MANIFEST, 0.1)
    near = Asked(PROMPT, {"safety": -1.05, "humanizing": 0.0}, False)
    count.add(near, Answer("safety", "other", MARGINS), MANIFEST, 0.1)
    assert (count.answered, count.decisions_equal, count.near, count.refused) == (3, 1, 1, 2)
    assert count.texts_equal == 2
    assert count.largest_difference == pytest.approx(0.5)


def test_tables_show_engines_that_did_not_start() -> None:
    machine = {
        "date": "d",
        "gpu": "card",
        "processor": "",
        "python": "3",
        "versions": {"vllm": "0"},
    }
    good = {**vars(Count(answered=3, bounds_kept=True)), **dict.fromkeys(COUNTERS, 5.0), "v2": True}
    engines = {
        "unmodified engine": {"demo": {"texts": 4, "texts_equal_to_itself": 4}},
        "eager": good,
        "n-gram drafts": {"failed": "no server\nmore", "log": ""},
    }
    ratio = {"ratio": 0.5, "low": 0.4, "high": 0.6}
    shape = {"tokens": 8, "vocab": 9, "hidden": 7, "dtype": "float32"}
    loss = {**shape, "fused_to": {"plain": {"seconds": ratio, "peak_bytes": ratio}}}
    step = {"runner": 2, "rows": 8, "deciding": 0, "device_us": 1.0, "host_us": 2.0}
    kernel = {
        "steps": [step],
        "profile": [{"rows": 8, "deciding": 0, "tensor_bytes": 0, "waits": 0}],
        "waits": "none",
    }
    parts = {
        "correctness": engines,
        "speed": {"tables": "TABLE"},
        "kernel": kernel,
        "loss": {"results": [loss], "liger": "measured"},
    }
    text = markdown({"machine": machine, "parts": parts, "seconds": {"loss": 2.0}})
    assert "| n-gram drafts | failed: no server |" in text
    assert "| eager | True | 3 |" in text
    assert "4 of 4 (demo)" in text
    assert "| V2 | 0 of 8 | 1.0 | 2.0 |" in text
    assert "| plain | 0.50 (0.40 to 0.60) |" in text
    assert "TABLE" in text
