from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from models.tokens import COCONOT_DESCRIPTIONS
from tests.training.conftest import Rows, WriteRows
from training.config.data import DataConfig
from training.config.loss import LossConfig
from training.data.mixture import Mixture, decision_weights, evaluation_rows, gather
from training.data.rows import Row

NAMES = ("safety", "humanizing")


def _row(prompt: str, category: str | None = None, **fields: Any) -> dict[str, object]:
    return {"prompt": prompt, "category": category, "response": "Yes.", **fields}


def _gather(*sources: Any, **fields: Any) -> Mixture:
    return gather(DataConfig.model_validate({"train": list(sources), **fields}), NAMES)


def _prompts(rows: list[Row]) -> list[str]:
    return [row.prompt[-1].content for row in rows]


def _pair(name: str) -> list[dict[str, object]]:
    return [_row(name, "safety", pair=name), _row(name, None, pair=name)]


def test_weight_repeats_rows_and_draws_the_rest_at_random(write_rows: WriteRows) -> None:
    path = str(write_rows([_row(f"prompt {number}") for number in range(10)]))

    once = Counter(_prompts(_gather({"path": path, "weight": 2.3}).rows))

    assert once.total() == 23
    assert sorted(once.values()) == [2] * 7 + [3] * 3


def test_limit_comes_before_the_weight(write_rows: WriteRows) -> None:
    path = str(write_rows([_row(f"prompt {number}") for number in range(10)]))

    counts = Counter(_prompts(_gather({"path": path, "weight": 2, "limit": 4}).rows))

    assert sorted(counts.values()) == [2, 2, 2, 2]


def test_draw_follows_the_seed_and_keeps_the_order(write_rows: WriteRows) -> None:
    path = str(write_rows([_row(f"prompt {number:03}") for number in range(100)]))
    source = {"path": path, "weight": 0.2}

    first, again, other = (_prompts(_gather(source, seed=seed).rows) for seed in (1, 1, 2))

    assert first == again == sorted(first)
    assert len(other) == 20
    assert first != other


def test_draw_does_not_change_with_the_sources_that_follow(write_rows: WriteRows) -> None:
    path = str(write_rows([_row(f"prompt {number:03}") for number in range(50)]))
    source = {"path": path, "limit": 10}

    alone = _prompts(_gather(source).rows)

    assert _prompts(_gather(source, {"path": path, "limit": 5}).rows)[:10] == alone


def test_draw_keeps_pairs_whole(write_rows: WriteRows) -> None:
    rows = [row for number in range(20) for row in _pair(f"prompt {number}")]

    mixture = _gather({"path": str(write_rows(rows)), "weight": 0.35})

    assert len(mixture.rows) == 14
    assert set(Counter(_prompts(mixture.rows)).values()) == {2}
    assert mixture.pairs == 7


def test_weight_that_leaves_nothing_is_refused(write_rows: WriteRows) -> None:
    path = str(write_rows([_row("a")]))

    with pytest.raises(ConfigError, match=r"weight 0\.1 leaves none of 1 rows"):
        _gather({"path": path, "weight": 0.1})


def test_duplicates_are_the_same_but_for_case_space_and_unicode_form(
    write_rows: WriteRows,
) -> None:
    rows = [
        _row("What is  ﬁne tea?"),
        _row("WHAT IS FINE TEA?"),
        _row("what\u00a0is\nfine tea?", response="Another answer."),
        _row("What is fine tea"),
    ]
    path = str(write_rows(rows))

    kept, dropped = _gather(path), _gather(path, deduplicate=True)

    assert (len(kept.rows), kept.sources[0].duplicates) == (4, 2)
    assert (len(dropped.rows), dropped.sources[0].duplicates) == (2, 2)
    assert [row.origin.rpartition(":")[2] for row in dropped.rows] == ["1", "4"]


def test_duplicate_with_a_response_stays_before_one_without(write_rows: WriteRows) -> None:
    path = str(write_rows([_row("a", "safety", response=None), _row("A", "safety")]))

    (row,) = _gather(path, deduplicate=True).rows

    assert row.response == "Yes."


def test_duplicates_are_found_across_sources(tmp_path: Path, write_rows: WriteRows) -> None:
    path = write_rows([_row("a"), _row("b")])
    other = tmp_path / "other.csv"
    other.write_text("prompt,category,response\nA,,x\nc,,y\n")

    mixture = _gather(str(path), {"path": str(other), "categories": {"": None}}, deduplicate=True)

    assert _prompts(mixture.rows) == ["a", "b", "c"]
    assert [source.duplicates for source in mixture.sources] == [0, 1]


def test_conversations_that_differ_earlier_are_no_duplicates(write_rows: WriteRows) -> None:
    rows: list[dict[str, object]] = [
        {
            "messages": [
                {"role": "user", "content": first},
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": "Go on"},
                {"role": "assistant", "content": "So."},
            ]
        }
        for first in ("One", "Two", "one")
    ]

    assert _gather(str(write_rows(rows))).sources[0].duplicates == 1


def test_conflicting_labels_are_counted_and_told(write_rows: WriteRows) -> None:
    path = write_rows(
        [_row("Lock?", "safety"), _row("Tea?"), _row("lock?"), _row("LOCK?", "humanizing")]
    )

    mixture = _gather(str(path))

    assert mixture.conflicts == 1
    assert mixture.conflict_examples == (f"{path}:1 says safety, {path}:3 says respond: 'lock?'",)


def test_declared_pairs_are_no_conflicts_and_no_duplicates(write_rows: WriteRows) -> None:
    mixture = _gather(str(write_rows([*_pair("a"), _row("a", "safety")])), deduplicate=True)

    assert (mixture.conflicts, mixture.pairs, len(mixture.rows)) == (0, 1, 3)


@pytest.mark.parametrize(("category", "missing"), [("safety", "answered"), (None, "refused")])
def test_pair_that_is_not_whole_is_refused(
    write_rows: WriteRows, category: str | None, missing: str
) -> None:
    path = write_rows([*_pair("whole"), _row("half", category, pair="p7"), _row("other")])

    with pytest.raises(ConfigError) as caught:
        _gather(str(path))

    first, last = caught.value.message.splitlines()
    assert first == f"{path}:3: pair 'p7' has no {missing} row of this prompt"
    assert "near_miss" in last


def test_single_token_maps_every_category_to_one(write_rows: WriteRows) -> None:
    path = str(
        write_rows(
            [_row("a", "safety"), _row("b", "humanizing"), _row("c", None, near_miss="safety")]
        )
    )

    mixture = gather(DataConfig.model_validate({"train": [path]}), NAMES, single_token=True)

    assert mixture.categories == {"refuse": 2, None: 1}
    assert mixture.near_misses == {"refuse": 1}


def test_summary_counts_everything(write_rows: WriteRows) -> None:
    rows: Rows = [
        *_pair("a"),
        _row("b", "humanizing", response=None),
        _row("c", None, near_miss="safety"),
        _row("C"),
        {"prompt": "d"},
    ]
    path = str(write_rows(rows))

    summary = _gather({"path": path, "bad_rows": "drop", "weight": 2}).summary()

    assert summary == {
        "rows": 10,
        "categories": {"safety": 2, "respond": 6, "humanizing": 2},
        "sources": {
            path: {
                "read": 5,
                "left_out": 1,
                "duplicates": 1,
                "taken": {"safety": 2, "respond": 6, "humanizing": 2},
            }
        },
        "deduplicated": False,
        "conflicts": 0,
        "near_misses": {"safety": 2},
        "pairs": 1,
        "variations": 0,
        "without_response": 2,
    }


def _sums(rows: list[Row], data: DataConfig, loss: LossConfig) -> dict[str | None, float]:
    weights = decision_weights(rows, data, loss)
    sums: dict[str | None, float] = {}
    for row in rows:
        (weight,) = weights.of_decisions(row)
        sums[row.category] = sums.get(row.category, 0.0) + weight
    return sums


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        # 8 answers of which 1 is a near miss of weight 3: 10; 4 of safety; 1 of humanizing: each
        # times the decision's weight of 2, so 20, 8 and 2, which make 30.
        (0.0, {None: 20.0, "safety": 8.0, "humanizing": 2.0}),
        (1.0, {None: 10.0, "safety": 10.0, "humanizing": 10.0}),
        # Square roots 4.4721, 2.8284, 1.4142 make 8.7148; times 30 / 8.7148.
        (0.5, {None: 15.3951, "safety": 9.7367, "humanizing": 4.8683}),
    ],
)
def test_balance_evens_out_what_the_decisions_weigh_in_sum(
    write_rows: WriteRows, balance: float, expected: dict[str | None, float]
) -> None:
    rows = [
        *[_row(f"answer {number}") for number in range(7)],
        _row("near", None, near_miss="safety"),
        *[_row(f"steal {number}", "safety") for number in range(4)],
        _row("love", "humanizing"),
        *_pair("pairs of weight 0 count nothing"),
    ]
    mixture = _gather(str(write_rows(rows)))
    data = DataConfig(train="demo", balance=balance, near_miss_weight=3.0)
    loss = LossConfig.model_validate({"decision": {"weight": 2.0}})

    assert _sums(mixture.rows, data, loss) == pytest.approx(expected, abs=1e-3)


def test_weights_of_text_and_pairs_come_from_the_loss(write_rows: WriteRows) -> None:
    rows = _gather(str(write_rows(_pair("a")))).rows
    loss = LossConfig.model_validate(
        {"decision": {"weight": 8, "pair_weight": 0.5}, "text": {"weight": 0.25}}
    )

    weights = decision_weights(rows, DataConfig(train="demo", balance=1.0), loss)

    assert weights.text == 0.25
    assert [weights.of_decisions(row) for row in rows] == [[0.5], [0.5]]


def test_demo_is_rendered_for_training_and_for_measuring() -> None:
    names = list(COCONOT_DESCRIPTIONS)

    assert gather(DataConfig(train="demo", seed=3), names).pairs == 850
    held_out = evaluation_rows("demo", names, limit=100, seed=3)
    assert len(held_out) == 100
    assert held_out[0].origin.startswith("demo/calibration, row ")


def test_evaluation_rows_are_a_seeded_draw_in_order(write_rows: WriteRows) -> None:
    path = str(write_rows([_row(f"prompt {number:03}") for number in range(50)]))
    origin = DataConfig.model_validate({"train": [path]}).train

    first, again, all_of_them = (
        _prompts(evaluation_rows(origin, NAMES, limit=limit, seed=0)) for limit in (9, 9, 50)
    )

    assert first == again == sorted(first)
    assert len(first) == 9
    assert len(all_of_them) == 50
