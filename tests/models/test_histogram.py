import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from models.errors import ConfigError
from models.histogram import (
    BINS,
    EDGES,
    PolicyMargins,
    RecordedMargins,
    bin_index,
    histogram,
    load_margins,
    save_margins,
    share_refused,
)


def _recorded() -> RecordedMargins:
    counts = tuple(histogram([0.0, 0.3, -21.0]).tolist())
    policy = PolicyMargins(rows=3, counts={"safety": counts})
    return RecordedMargins(
        since="2026-11-01T00:00:00Z", until="2026-11-02T00:00:00Z", policies={"default": policy}
    )


def test_edges_are_quarters_from_minus_twenty_to_twenty() -> None:
    assert EDGES[0] == -20
    assert EDGES[-1] == 20
    assert EDGES[80] == 0
    assert {b - a for a, b in pairwise(EDGES)} == {0.25}
    assert BINS == 162


def test_bin_holds_its_lower_edge_and_not_its_upper_one() -> None:
    # Bin 0 is below -20, bin 1 is [-20, -19.75), so bin 81 is [0, 0.25) and 161 is from 20 on.
    margins = [-np.inf, -20.001, -20.0, -19.75, -1e-9, 0.0, 0.2499, 0.25, 19.999, 20.0, np.inf]
    assert bin_index(margins).tolist() == [0, 0, 1, 2, 80, 81, 81, 82, 160, 161, 161]


def test_bin_index_keeps_the_shape() -> None:
    assert bin_index(np.zeros((2, 3), dtype=np.float32)).shape == (2, 3)


def test_histogram_counts_every_margin_once() -> None:
    counts = histogram([[0.1, 0.2], [30.0, -0.1]])

    assert counts.sum() == 4
    assert counts[[80, 81, 161]].tolist() == [1, 2, 1]


def test_recorded_margins_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "margins.json"
    save_margins(path, _recorded())

    assert load_margins(path) == _recorded()
    assert [entry.name for entry in tmp_path.iterdir()] == ["margins.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [0.0, 1.0]}, "edges: .*161 edges from -20.0 to 20.0"),
        ({"version": 2}, "version"),
        ({"policies": {"default": {"rows": 1, "counts": {"safety": [1]}}}}, "162"),
        ({"policies": {"default": {"rows": 4, "counts": {"safety": [1] * 162}}}}, "4 decisions"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_file_of_another_form_names_what_is_wrong(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "margins.json"
    path.write_text(json.dumps({**_recorded().model_dump(), **change}))

    with pytest.raises(ConfigError, match=f"margins.json: .*{message}"):
        load_margins(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json: cannot be read"):
        load_margins(tmp_path / "absent.json")


def test_share_refused_counts_what_a_bias_lifts_to_zero() -> None:
    shares = histogram([-30.0, -0.2, -0.1, 0.1, 30.0]) / 5

    assert share_refused(shares, math.inf) == 1
    assert share_refused(shares, -math.inf) == 0
    assert share_refused(shares, 0.0) == pytest.approx(2 / 5)
    # Halfway through the bin [-0.25, 0), which holds two margins.
    assert share_refused(shares, 0.125) == pytest.approx(3 / 5)
    assert share_refused(shares, 0.25) == pytest.approx(4 / 5)
    assert share_refused(shares, -20.0) == pytest.approx(1 / 5)
