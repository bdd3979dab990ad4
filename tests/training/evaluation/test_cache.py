from pathlib import Path

from training.evaluation.cache import Cache


def test_answers_outlive_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Cache(path, "weights")[["score", "a"]] = [1.5, None]

    again = Cache(path, "weights")

    assert ["score", "a"] in again
    assert again[["score", "a"]] == [1.5, None]
    assert ["score", "b"] not in again


def test_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first = Cache(path, "weights")
    first["a"], first["b"] = 1, 2
    path.write_text(path.read_text()[:-4])

    again = Cache(path, "weights")
    assert ("a" in again, "b" in again) == (True, False)
    again["b"] = 2
    assert Cache(path, "weights")["b"] == 2


def test_answers_of_other_weights_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Cache(path, "weights")["a"] = 1

    assert "a" not in Cache(path, "other weights")
    assert "a" not in Cache(path, "weights")


def test_finished_run_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    cache = Cache(path, "weights")
    cache["a"] = 1
    cache.close(remove=True)

    assert not path.exists()


def test_without_a_file_it_remembers_all_the_same() -> None:
    cache = Cache(None, "weights")
    cache["a"] = 1
    cache.close(remove=True)

    assert cache["a"] == 1
