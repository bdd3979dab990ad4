"""The demo data: what the tiny model of the demo can and must learn from it."""

import json
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from training.demo_data import render as render_module
from training.demo_data.render import Row, Sampler, render, write
from training.demo_data.world import CATEGORIES, load_world

SOURCES = Path(render_module.__file__).parent


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return render(seed=0)


def refused_unpaired(rows: list[Row]) -> Counter[str]:
    return Counter(row["category"] for row in rows if row["category"] and not row["pair"])


def answered_unpaired(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["category"] is None and not row["pair"]]


def test_train_counts_hold_per_category(splits: dict[str, list[Row]]) -> None:
    assert refused_unpaired(splits["train"]) == dict.fromkeys(CATEGORIES, 600)
    assert len(answered_unpaired(splits["train"])) == 4000


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_held_out_counts_hold_per_category(splits: dict[str, list[Row]], split: str) -> None:
    assert refused_unpaired(splits[split]) == dict.fromkeys(CATEGORIES, 600)
    assert len(answered_unpaired(splits[split])) == 1500
    assert all(row["pair"] is None for row in splits[split])


@pytest.mark.parametrize("split", ["train", "calibration", "evaluation"])
def test_near_misses_are_a_third_of_what_is_answered(
    splits: dict[str, list[Row]], split: str
) -> None:
    kinds = Counter(row["kind"] for row in answered_unpaired(splits[split]))
    assert kinds["near_miss"] / kinds.total() == pytest.approx(1 / 3, abs=0.01)
    assert set(kinds) == {"near_miss", "answer"}


def test_render_other_seed_gives_other_rows(splits: dict[str, list[Row]]) -> None:
    assert render(seed=1)["train"] != splits["train"]


def test_write_same_seed_gives_same_bytes(tmp_path: Path) -> None:
    counts = write(tmp_path / "a", seed=3)
    write(tmp_path / "b", seed=3)
    for name in counts:
        first = (tmp_path / "a" / f"{name}.jsonl").read_bytes()
        assert first == (tmp_path / "b" / f"{name}.jsonl").read_bytes()


def test_write_counts_and_field_order_match_the_rows(
    tmp_path: Path, splits: dict[str, list[Row]]
) -> None:
    counts = write(tmp_path, seed=0)
    assert counts == {name: len(rows) for name, rows in splits.items()}
    lines = (tmp_path / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == splits["evaluation"]
    fields = ["prompt", "category", "response", "answer", "template", "pair", "kind"]
    assert list(json.loads(lines[0])) == fields


def test_prompts_are_unique_but_for_pairs(splits: dict[str, list[Row]]) -> None:
    rows = [row for split in splits.values() for row in split]
    single = Counter(row["prompt"] for row in rows if row["pair"] is None)
    paired = Counter(row["prompt"] for row in rows if row["pair"] is not None)
    assert set(single.values()) == {1}
    assert set(paired.values()) == {2}
    assert not single.keys() & paired.keys()


def test_pairs_refuse_once_and_answer_once(splits: dict[str, list[Row]]) -> None:
    pairs: defaultdict[str, list[Row]] = defaultdict(list)
    for row in splits["train"]:
        if row["pair"] is not None:
            pairs[row["pair"]].append(row)
    assert all(row["kind"] == "pair" for rows in pairs.values() for row in rows)
    for first, second in pairs.values():
        assert first["prompt"] == second["prompt"]
        assert first["response"] != second["response"]
        assert (first["category"] is None) != (second["category"] is None)


def test_pairs_cover_each_category_with_its_own_prompts(splits: dict[str, list[Row]]) -> None:
    own = Counter(
        row["category"]
        for row in splits["train"]
        if row["pair"] and row["category"] and row["category"] in row["template"].split("/")
    )
    assert own == dict.fromkeys(CATEGORIES, 70)


def test_held_out_templates_are_never_trained_on(splits: dict[str, list[Row]]) -> None:
    trained = {row["template"] for row in splits["train"]}
    held_out = {row["template"] for name in splits for row in splits[name] if name != "train"}
    assert not trained & held_out


def test_held_out_halves_share_templates_and_facts(splits: dict[str, list[Row]]) -> None:
    calibration, evaluation = (
        Counter((row["template"], row["category"]) for row in splits[name])
        for name in ("calibration", "evaluation")
    )
    assert all(abs(calibration[key] - evaluation[key]) <= 1 for key in calibration | evaluation)
    taught = {row["answer"] for row in splits["train"]}
    assert {row["answer"] for row in splits["evaluation"]} <= taught


def test_each_category_has_many_templates() -> None:
    templates = load_world().templates
    own = {t for t in templates if t.kind in {"refuse", "borderline"}}
    counts = Counter((t.category, t.split) for t in own)
    assert len({t.text for t in own}) == len(own)
    assert len(counts) == 2 * len(CATEGORIES)
    assert min(counts.values()) >= 25


def test_no_text_contains_a_control_token_or_an_open_slot(splits: dict[str, list[Row]]) -> None:
    rows = [row for split in splits.values() for row in split]
    texts = [text for row in rows for text in (row["prompt"], row["response"])]
    assert not [text for text in texts if re.search(r"\[refuse|\[respond|[<>|\[\]]", text)]


def test_texts_are_short_sentences(splits: dict[str, list[Row]]) -> None:
    for row in (row for rows in splits.values() for row in rows):
        assert re.fullmatch(r"[A-Z0-9].*[.?]", row["prompt"])
        assert re.fullmatch(r"[A-Z0-9].*[.?]", row["response"])
        assert len(row["prompt"].split()) <= 25
        assert len(row["response"].split()) <= 20


def test_answers_occur_in_their_responses(splits: dict[str, list[Row]]) -> None:
    checked = [row for rows in splits.values() for row in rows if row["answer"] is not None]
    assert len(checked) > 3000
    assert all(row["answer"] in row["response"] for row in checked if row["answer"])
    assert all(row["category"] is None for row in checked)


def test_refusals_of_a_category_are_no_other_rows_response(
    splits: dict[str, list[Row]],
) -> None:
    meanings: defaultdict[str, set[str | None]] = defaultdict(set)
    for row in splits["train"]:
        meanings[row["response"]].add(row["category"])
    assert all(len(categories) == 1 for categories in meanings.values())


def test_borderline_wording_decides_how_often_it_is_refused() -> None:
    world = load_world()
    sampler = Sampler(world, Random(0))
    templates = world.select("borderline", "safety", "train")
    for draw in sampler.draw(templates, 50):
        wordings = [text for text in world.graded["intent"] if text in draw.prompt]
        assert draw.refuse_probability == world.graded["intent"][wordings[0]]


def test_draw_of_plain_templates_is_certain() -> None:
    world = load_world()
    sampler = Sampler(world, Random(0))
    refuse = sampler.draw(world.select("refuse", "safety", "train"), 20)
    near = sampler.draw(world.select("near_miss", "safety", "train"), 20)
    assert {draw.refuse_probability for draw in refuse} == {1.0}
    assert {draw.refuse_probability for draw in near} == {0.0}


def test_draw_fills_a_repeated_slot_with_different_values() -> None:
    world = load_world()
    template = next(t for t in world.templates if t.text == "Is <riddle> worth more than <riddle>?")
    for draw in Sampler(world, Random(0)).draw([template], 20):
        first, second = re.findall(r"[Ii]s (\w+) worth more than (\w+)\?", draw.prompt)[0]
        assert first != second


def test_draw_more_than_the_templates_hold_is_an_error() -> None:
    world = load_world()
    template = replace(world.templates[0], text="Where is the bank?")
    with pytest.raises(ValueError, match="100 prompts wanted, only 7 found in 1 templates"):
        Sampler(world, Random(0)).draw([template], 100)


def test_refusal_without_subject_names_none() -> None:
    sampler = Sampler(load_world(), Random(0))
    texts = {sampler.refusal(category) for category in CATEGORIES for _ in range(30)}
    assert not [text for text in texts if "<" in text]


def test_load_world_unknown_slot_is_an_error(tmp_path: Path) -> None:
    for source in SOURCES.glob("*.yaml"):
        shutil.copy(source, tmp_path)
    path = tmp_path / "safety.yaml"
    text = path.read_text(encoding="utf-8").replace("<building> <night>", "<castle>", 1)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"'safety/burglary-1' names the unknown slot <castle>"):
        load_world(tmp_path)
