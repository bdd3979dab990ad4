from tests.training.calibration.test_report import _calibration
from training.calibration.sources import compare_sources
from training.data.rows import Message, Row


def _rows(origins: list[str]) -> list[Row]:
    turns = (Message(role="user", content="?"), Message(role="assistant", content=""))
    return [Row(turns, None, None, origin) for origin in origins]


def test_sources_that_behave_differently_are_named() -> None:
    # Margins of safety rise from the first to the last prompt: one source has the lower half.
    calibration = _calibration()
    origins = [f"easy.jsonl:{n}" for n in range(20)] + [f"hard, row {n}" for n in range(20)]
    origins += [f"other.jsonl:{n}" for n in range(140)]

    compared = compare_sources(calibration, _rows(origins))

    assert [(s.category, s.name, s.prompts) for s in compared.found] == [
        ("safety", "easy.jsonl", 20),
        ("safety", "hard", 20),
    ]
    assert [s.refused for s in compared.found] == [0.0, 1.0]
    assert [s.left_out for s in compared.found] == [0.0, 1.0]
    assert compared.differing == ("safety",)
    assert compared.error == 0.5
    assert "differ by more than chance" in str(compared.table().caption)


def test_sources_that_behave_alike_are_not() -> None:
    calibration = _calibration()
    mixed = [("a.csv" if n % 2 else "b.csv") + f":{n}" for n in range(180)]

    compared = compare_sources(calibration, _rows(mixed))

    assert len(compared.found) == 4
    assert compared.differing == ()
    assert compared.error is not None
    assert compared.error < 0.06


def test_one_source_or_too_few_prompts_are_not_compared() -> None:
    calibration = _calibration()
    one = [f"a.csv:{n}" for n in range(180)]
    few = ["b.csv:1"] * 19 + one[19:]

    assert compare_sources(calibration, _rows(one)).found == ()
    assert compare_sources(calibration, _rows(few)).found == ()
