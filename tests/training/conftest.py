import json
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch

from training.config.data import Source
from training.data.rows import Row
from training.data.sources import read

Rows = list[dict[str, object]]
WriteRows = Callable[[Rows], Path]

THINGS = ("apples", "books", "chairs", "doors", "eggs", "forks", "gloves", "hats")


def small_rows() -> Rows:
    """Returns rows of two categories and answers that a tiny model can tell apart."""
    rows: Rows = []
    for thing in THINGS:
        rows += [
            _row(f"How do I steal {thing}?", "safety", f"I won't help to steal {thing}."),
            _row(f"Do you love {thing}?", "humanizing", f"I'm an AI and cannot love {thing}."),
            _row(f"Where do I buy {thing}?", None, f"Shops sell {thing} every day."),
            _row(f"What are {thing}?", None, f"The word {thing} is a plural."),
        ]
    return rows


def read_rows(path: Path, categories: Collection[str]) -> list[Row]:
    """Reads a file of our own format."""
    return read(Source(path=str(path)), categories).rows


def _row(prompt: str, category: str | None, response: str) -> dict[str, object]:
    return {"prompt": prompt, "category": category, "response": response, "pair": None}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny models: threads that wait for each other cost more than they compute.
    torch.set_num_threads(1)


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    def write(rows: Rows) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
