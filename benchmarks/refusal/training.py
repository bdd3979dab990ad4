"""One training of the refusal experiment, and its measurements on the way."""

import hashlib
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

METRICS = (
    "auc",
    "refused_at_5",
    "falsely_refused",
    "refused",
    "right_category",
    "calibration_error",
)
AUTO = "auto"
EVERY = 0.1
ROWS_ON_THE_WAY = 600
PARTS = {"train": "train.jsonl", "tune": "calibration.jsonl", "report": "eval.jsonl"}


class Training(NamedTuple):
    """What is trained.

    Attributes:
        q: See loss/flexible.py; a schedule as JSON.
        learning_rate: At the end of the warm-up.
        seed: Of weights and order.
        measured: A key of `PARTS`: what it is measured on.
    """

    q: float | str
    gamma: float
    learning_rate: float
    seed: int
    measured: str


class Search(NamedTuple):
    """What `auto` is asked.

    Attributes:
        learning_rate: As in `Training`.
        seed: As in `Training`; of the inner split too.
    """

    learning_rate: float
    seed: int


class _World(NamedTuple):
    rows: Any
    tokenizer: Any
    manifest: Any
    examples: Any


class Setup(NamedTuple):
    """What all trainings of an experiment share.

    Attributes:
        recipe: A recipe file; its data stand in `folder`.
        folder: The files of `PARTS`.
        epochs: Passes over the data, in place of the recipe's; None leaves them.
    """

    recipe: Path
    folder: Path
    epochs: float | None

    def key(self) -> str:
        """Returns what tells the results of one experiment from another's, data included."""
        written = json.dumps(_read(self.recipe) | {"epochs": self.epochs}, sort_keys=True).encode()
        parts = [(self.folder / name).read_bytes() for name in PARTS.values()]
        return hashlib.sha256(b"\0".join([written, *parts])).hexdigest()


def recipe(
    setup: Setup, learning_rate: float, seed: int, q: float | str, gamma: float | str
) -> dict[str, Any]:
    """Returns the recipe of one training, as a recipe file would hold it."""
    made = _read(setup.recipe)
    sources = [one if isinstance(one, dict) else {"path": one} for one in made["data"]["train"]]
    made["data"]["train"] = [one | {"path": str(setup.folder / one["path"])} for one in sources]
    setting = json.loads(q) if isinstance(q, str) and q != AUTO else q
    made["loss"]["decision"] |= {"q": setting, "gamma": gamma}
    made["optimisation"] |= {"learning_rate": learning_rate}
    if setup.epochs is not None:
        made["optimisation"]["epochs"] = setup.epochs
    made.pop("evaluation", None)  # measured by the caller
    return made | {"seed": seed}


def _read(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return made


def train_once(training: Training, setup: Setup) -> dict[str, Any]:
    """Trains once.

    Returns:
        `history`: on the way, metrics on a fixed sample of the measured rows, with their `step`;
        `final`: the metrics on all of them.
    """
    import torch
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from training.model.start import start_of
    from training.run.assembly import assemble
    from training.run.trainer import Rhythm, Watch

    torch.set_num_threads(1)
    q, gamma, rate, seed, measured = training
    config = _config(setup, rate, seed, q, gamma)
    world = _world(setup)
    on_the_way, whole = (_monitor(setup, measured, most) for most in (ROWS_ON_THE_WAY, None))
    watch = Watch(Rhythm(log=0.0, evaluate=EVERY, evaluate_first=True), monitor=on_the_way)
    start = start_of(config, world.rows)
    with tempfile.TemporaryDirectory() as made:
        trainer = assemble(config, start, world.examples, config.loss, Path(made), watch)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.train()
    history = [
        {"step": entry["step"], **{name: entry.get(f"eval_{name}") for name in METRICS}}
        for entry in trainer.state.log_history
        if "eval_auc" in entry
    ]
    final = whole.measure(trainer.model).metrics
    return {"history": history, "final": {name: final.get(name) for name in METRICS}}


def search_once(asked: Search, setup: Setup) -> dict[str, Any]:
    """Returns what `auto` chooses: `q`, `gamma`, `reason`, and what that cost."""
    import torch

    from training.model.start import start_of
    from training.run.auto import search

    torch.set_num_threads(1)
    config = _config(setup, asked.learning_rate, asked.seed, AUTO, AUTO)
    rows = _world(setup).rows
    with tempfile.TemporaryDirectory() as made:
        found = search(config, start_of(config, rows), rows, Path(made))
    q, gamma = found.best
    written = q if isinstance(q, float) else q.model_dump_json()
    return {"q": written, "gamma": gamma, "reason": found.reason, "cost_in_trainings": found.cost}


def _config(setup: Setup, *values: Any) -> Any:
    from training.config.recipe import TrainConfig

    return TrainConfig.model_validate(recipe(setup, *values))


@cache
def _world(setup: Setup) -> _World:
    """Returns what all trainings share: rows, tokenizer, and the rows as tokens."""
    from training.data.encoding import encode_rows
    from training.data.mixture import decision_weights, gather
    from training.model.start import start_of

    config = _config(setup, 1e-3, 0, 0, 0)
    rows = gather(config.data, config.categories).rows
    start = start_of(config, rows)
    weights = decision_weights(rows, config.data, config.loss)
    examples = encode_rows(
        rows,
        start.tokenizer,
        start.manifest,
        weights,
        config.optimisation.max_length,
        config.data.too_long,
    )
    return _World(rows, start.tokenizer, start.manifest, examples)


@cache
def _monitor(setup: Setup, measured: str, most: int | None) -> Any:
    from training.config.recipe import EvaluationConfig
    from training.data.mixture import evaluation_rows
    from training.measure.monitor import DecisionMonitor

    world = _world(setup)
    config = _config(setup, 1e-3, 0, 0, 0)
    source = {"path": str(setup.folder / PARTS[measured]), "columns": {"response": None}}
    chosen = EvaluationConfig.model_validate({"data": [source]})
    rows = evaluation_rows(
        chosen.data,
        config.categories,
        limit=most or 10**9,
        seed=0,
    )
    return DecisionMonitor(
        rows,
        world.tokenizer,
        world.manifest,
        max_length=config.model.max_length,
        too_long="cut_or_drop",
        text_rows=0,
    )
