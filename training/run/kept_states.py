"""What the rows of control tokens were learnt from, kept in the checkpoint's folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.files import write_atomically
from training.model.token_rows import Decisions

# In a folder of its own: `*.safetensors` beside the weights would count as weights.
KEPT_STATES = Path("decisions") / "states.safetensors"


def keep_states(folder: Path, decisions: Decisions, names: Sequence[str]) -> None:
    """Writes decisions into a checkpoint's folder.

    Args:
        folder: The checkpoint's.
        decisions: Their states are kept in half precision.
        names: The categories, in the order of the labels.
    """
    from safetensors.numpy import save

    arrays: dict[str, NDArray[Any]] = {
        "states": decisions.states.astype(np.float16),
        "labels": decisions.labels,
        "weights": decisions.weights,
    }
    (folder / KEPT_STATES).parent.mkdir(exist_ok=True)
    content = save(arrays, metadata={"names": json.dumps(list(names))})
    write_atomically(folder / KEPT_STATES, content)


def kept_states(folder: Path, names: Sequence[str]) -> Decisions | None:
    """Reads them back, None where there are none.

    Args:
        folder: The checkpoint's.
        names: The categories to label them by. Decisions of others are left out.
    """
    from safetensors import safe_open

    if not (folder / KEPT_STATES).is_file():
        return None
    with safe_open(folder / KEPT_STATES, framework="numpy") as file:
        old = [*json.loads(file.metadata()["names"]), None]
        states, labels, weights = (file.get_tensor(n) for n in ("states", "labels", "weights"))
    new = {name: column for column, name in enumerate([*names, None])}
    columns = np.array([new.get(name, -1) for name in old])[labels]
    decisions = Decisions(states.astype(np.float64), columns, weights)
    return decisions.of(columns >= 0)
