"""`auto`: the inner split, and what the search makes of scores."""

import json
import math
from itertools import product
from pathlib import Path

import pytest

from models.checkpoint import load_checkpoint
from models.errors import ConfigError
from tests.training.conftest import Rows, WriteRows, small_rows
from tests.training.recipes import tiny_config
from training.config.loss import DecisionLoss, LossConfig, QSchedule
from training.data.rows import Message, Row
from training.run.auto import (
    BUDGETS,
    CANDIDATES,
    KEEP,
    STANDARD,
    Candidate,
    InnerSplit,
    LossChoice,
    area_error,
    choose_loss,
    inner_split,
    is_auto,
    read_choice,
    with_choice,
)
from training.run.record import describe_loss
from training.run.train import train


def row(prompt: str, category: str | None, pair: str | None = None, *earlier: Message) -> Row:
    asked = Message(role="user", content=prompt)
    reply = Message(role="assistant", content="Well.", category=category)
    return Row((*earlier, asked, reply), None, pair, f"rows.jsonl:{prompt}")


def rows_of(refused: int, answered: int) -> list[Row]:
    kinds = ["safety"] * (refused // 2) + ["unsupported"] * (refused - refused // 2)
    return [row(f"prompt {at}", kind) for at, kind in enumerate([*kinds, *[None] * answered])]


def split_of(refused: int = 100, answered: int = 100) -> InnerSplit:
    return InnerSplit([], rows_of(refused, answered))


def test_split_takes_the_same_share_of_every_category() -> None:
    split = inner_split(rows_of(200, 400), seed=3)
    assert len(split.train) + len(split.validation) == 600
    drawn = [one.category for one in split.validation]
    assert [drawn.count(kind) for kind in ("safety", "unsupported", None)] == [20, 20, 80]


def test_split_depends_on_rows_and_seed_alone() -> None:
    rows = rows_of(150, 150)
    assert inner_split(rows, 5) == inner_split(list(rows), 5)
    assert inner_split(rows, 5) != inner_split(rows, 6)


def test_parts_keep_the_order_of_the_rows_and_share_none() -> None:
    rows = rows_of(150, 150)
    place = {one.origin: at for at, one in enumerate(rows)}
    split = inner_split(rows, 0)
    for part in split:
        places = [place[one.origin] for one in part]
        assert places == sorted(places)
    assert {r.origin for r in split.train} | {r.origin for r in split.validation} == set(place)


def test_rows_of_a_pair_stay_on_one_side() -> None:
    rows = [
        row(f"{kind} {at}", kind, f"pair {at}")
        for at, kind in product(range(300), ("safety", None))
    ]
    split = inner_split(rows, 1)
    assert len(split.validation) == 120
    assert not {r.pair for r in split.train} & {r.pair for r in split.validation}


def test_prompts_that_differ_in_unicode_form_stay_on_one_side() -> None:
    # The mixture counts a ligature and its letters as the same prompt; so does `auto`.
    rows = [
        row(f"{word} {at}", kind)
        for at in range(200)
        for kind, word in (("safety", "\ufb01le"), ("safety", "file"), (None, "answer"))
    ]
    split = inner_split(rows, 1)

    def files(part: list[Row]) -> list[str]:
        return [r.prompt[-1].content.split()[-1] for r in part if r.category]

    assert not set(files(split.train)) & set(files(split.validation))


def test_a_prompt_that_opens_a_longer_conversation_stays_with_it() -> None:
    rows = rows_of(200, 200)
    longer = []
    for one in rows:
        longer.append(row("and now?", one.category, None, *one.messages))
    split = inner_split([*rows, *longer], 2)
    firsts = [{r.messages[0].content for r in part} for part in split]
    assert not firsts[0] & firsts[1]


def test_links_reach_over_several_rows() -> None:
    # a-b by pair, b-c by prompt, c-d by pair.
    rows = rows_of(200, 200)
    rows += [
        row("one", "safety", "left"),
        row("two", "safety", "left"),
        row("Two", "safety", "right"),
        row("three", "safety", "right"),
    ]
    for seed in range(20):
        split = inner_split(rows, seed)
        inside = sum(r.pair is not None for r in split.validation)
        assert inside in (0, 4)


def test_prompts_both_refused_and_answered_are_not_compared_on() -> None:
    rows = rows_of(200, 200)
    both = [row(f"twin {at}", kind, f"{at}") for at in range(100) for kind in ("safety", None)]
    split = inner_split([*rows, *both], 0)
    assert not [r for r in split.validation if r.pair is not None]
    assert len(split.validation) == 80
    # Those whose group was drawn are on neither side.
    assert sum(r.pair is not None for r in split.train) == 160


def test_too_few_rows_are_named() -> None:
    with pytest.raises(ConfigError, match=r"of these 130 rows it could set aside 6 and 20"):
        inner_split(rows_of(30, 100), 0)


def test_all_rows_tied_together_are_too_few() -> None:
    rows = [row(f"p{at}", None if at % 2 else "safety", "all") for at in range(400)]
    with pytest.raises(ConfigError, match="it could set aside 0 and 0"):
        inner_split(rows, 0)


def test_error_of_an_area_by_hand() -> None:
    # A = 0.9, 50 and 100: Q1 = .9/1.1, Q2 = 1.62/1.9.
    # .09 + 49·(.8181818 - .81) + 99·(.8526316 - .81) = .09 + .4009091 + 4.2205263 = 4.7114354
    assert area_error(0.9, 50, 100) == pytest.approx(math.sqrt(4.7114354 / 5000), rel=1e-6)
    assert area_error(1.0, 50, 100) == 0
    assert area_error(math.nan, 50, 100) == 0


def first(q: float | QSchedule) -> float:
    """What q begins with."""
    return q.start if isinstance(q, QSchedule) else q


def test_the_best_candidate_wins() -> None:
    wanted = Candidate(0.7, 0.0)
    choice = choose_loss(
        lambda q, g, share: 0.9 - abs(first(q) - 0.7) / 3 - g / 3, split_of(), seed=4
    )
    assert choice.best == wanted


def test_a_schedule_can_win_and_is_read_back(tmp_path: Path) -> None:
    choice = choose_loss(lambda q, g, share: 0.7 - first(q) / 5, split_of(), seed=4)
    (tmp_path / "loss_choice.json").write_text(choice.to_json())

    found = read_choice(tmp_path)

    assert found == choice.best == Candidate(QSchedule(start=-1, end=0, over=0.5), 0.0)
    loss = with_choice(LossConfig(decision=DecisionLoss(q="auto")), found)
    assert loss.decision == DecisionLoss(q={"start": -1, "end": 0, "over": 0.5}, gamma=0.0)


def test_cross_entropy_can_win_and_wins_ties() -> None:
    choice = choose_loss(lambda q, g, share: 0.8 - abs(first(q)) - g, split_of(), seed=0)
    assert choice.best == STANDARD
    assert choose_loss(lambda q, g, share: 0.8, split_of(), seed=0).best == STANDARD


def test_less_than_chance_leaves_cross_entropy() -> None:
    # Error at .9 with 100 and 100: .0222; half of it is asked for.
    for gain, best in ((0.010, STANDARD), (0.012, Candidate(0.3, 0.0))):
        choice = choose_loss(
            lambda q, g, share, gain=gain: 0.9 + gain * ((q, g) == (0.3, 0.0)),  # type: ignore[misc]
            split_of(),
            seed=0,
        )
        assert choice.best == best


def test_a_training_that_fails_does_not_win() -> None:
    choice = choose_loss(
        lambda q, g, share: math.nan if first(q) > 0.5 else 0.6 + first(q) / 10, split_of(), seed=0
    )
    assert choice.best in [member for member in CANDIDATES if member.q == 0.3]
    record = json.loads(choice.to_json())
    assert [t["score"] for t in record["trials"] if t["q"] == 0.7] == [None]


def test_the_record_tells_what_was_tried_and_why() -> None:
    choice = choose_loss(
        lambda q, g, share: 0.7 + first(q) / 10 + share / 10, split_of(60, 80), seed=9
    )
    record = json.loads(choice.to_json())
    assert (record["q"], record["gamma"], record["seed"]) == (1.0, 1.0, 9)
    assert record["rows"] == {"train": 0, "refused": 60, "answered": 80}
    assert len(record["trials"]) == len(CANDIDATES) + KEEP[0] + 1
    assert record["trials"][0] == {
        "q": 0.0,
        "gamma": 0.0,
        "share_of_steps": BUDGETS[0],
        "score": pytest.approx(0.71),
        "kept": True,
    }
    assert record["cost_in_trainings"] == pytest.approx(len(CANDIDATES) * 0.1 + 3 * 0.3)
    assert "above the standard's" in record["reason"]


def scored(scores: dict[Candidate, tuple[float, ...]]) -> LossChoice:
    """Searches among the candidates of a table: a score for each round that they reach."""
    rounds = dict(zip(BUDGETS, range(len(BUDGETS)), strict=True))
    return choose_loss(
        lambda q, gamma, share: scores[Candidate(q, gamma)][rounds[share]],
        split_of(),
        seed=0,
        candidates=list(scores),
    )


A, B, C = Candidate(0.3, 0.0), Candidate(0.7, 0.0), Candidate(1.0, 1.0)


def test_only_the_best_two_and_cross_entropy_go_on() -> None:
    # C has no score of the second round: an IndexError would end this.
    choice = scored({STANDARD: (0.1, 0.5), A: (0.8, 0.7), B: (0.9, 0.6), C: (0.7,)})

    assert choice.best == A
    assert [(t.candidate, t.kept) for t in choice.trials] == [
        *((STANDARD, True), (A, True), (B, True), (C, False)),
        *((STANDARD, False), (A, True), (B, False)),
    ]


def test_what_is_no_number_is_the_worst() -> None:
    nothing = math.nan
    assert scored({STANDARD: (0.5, nothing), A: (math.inf, 0.4), B: (0.4, 0.3)}).best == B
    choice = scored({STANDARD: (nothing, nothing), A: (nothing, nothing)})
    assert choice.best == STANDARD
    assert choice.reason == "no candidate gave a score"


def test_cross_entropy_must_be_a_candidate() -> None:
    with pytest.raises(ValueError, match="must include cross-entropy"):
        choose_loss(lambda q, g, share: 0.5, split_of(), seed=0, candidates=[Candidate(0.7, 0.0)])


def test_auto_is_for_both_or_none() -> None:
    assert is_auto(LossConfig(decision=DecisionLoss(q="auto")))
    assert is_auto(LossConfig(decision=DecisionLoss(gamma="auto")))
    assert not is_auto(LossConfig())
    assert not is_auto(LossConfig(decision=DecisionLoss(q={"safety": 0.5})))
    with pytest.raises(ValueError, match="make gamma auto too"):
        DecisionLoss(q="auto", gamma=1.0)
    with pytest.raises(ValueError, match="make q auto too"):
        DecisionLoss(q={"safety": 0.5}, gamma="auto")


def test_auto_is_resolved_recorded_and_kept(tmp_path: Path) -> None:
    rows = tmp_path / "many.jsonl"
    lines = [
        {**row, "prompt": f"{number}: {row['prompt']}", "pair": None}
        for number in range(12)
        for row in small_rows()
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    auto = tiny_config(
        rows,
        loss={"decision": {"q": "auto", "gamma": "auto"}},
        optimisation={"epochs": 0.5, "batch_size": 16},
    )

    out = train(auto, tmp_path / "out")

    choice = json.loads((out / "loss_choice.json").read_text())
    resolved = LossConfig.model_validate({"decision": {"q": choice["q"], "gamma": choice["gamma"]}})
    manifest, _ = load_checkpoint(out)
    assert manifest.recipe is not None
    assert manifest.recipe.loss == describe_loss(resolved)
    assert manifest.recipe.config_sha256 == auto.sha256()
    assert len(choice["trials"]) >= 7
    assert all(trial["score"] is not None for trial in choice["trials"])
    assert not (out / "search").exists()


def test_auto_whose_rows_of_one_kind_are_all_too_long_is_one_line(
    write_rows: WriteRows, tmp_path: Path
) -> None:
    rows: Rows = [
        {**row, "prompt": f"{number} {row['prompt']}"}
        | ({"response": "No. " * 80} if row["category"] else {})
        for number in range(7)
        for row in small_rows()
    ]
    config = tiny_config(write_rows(rows), loss={"decision": {"q": "auto"}})
    data = config.data.model_copy(update={"too_long": "drop"})

    with pytest.raises(ConfigError, match="all that were set aside are too long"):
        train(config.model_copy(update={"data": data}), tmp_path / "out")
