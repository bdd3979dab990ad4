"""One training of the refusal experiment: the decision alone, and its measurements on the way."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

METRICS = (
    "auc",
    "refused_at_5",
    "falsely_refused",
    "refused",
    "right_category",
    "calibration_error",
)
EVERY = 0.1
ROWS_ON_THE_WAY = 600
MAX_LENGTH = 64
PARTS = {"train": "train.jsonl", "tune": "calibration.jsonl", "report": "eval.jsonl"}


class Training(NamedTuple):
    """What is trained.

    Attributes:
        q: See loss/flexible.py.
        gamma: See loss/flexible.py.
        learning_rate: At the end of the warm-up.
        seed: Of weights and order.
        measured: A key of `PARTS`: what it is measured on.
    """

    q: float
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


def recipe(
    folder: Path, epochs: float, learning_rate: float, seed: int, q: float | str, gamma: float | str
) -> dict[str, Any]:
    """Returns the recipe of a training, as a recipe file would hold it.

    The responses are left out: nothing comes behind a decision, so a row costs its prompt alone.
    """
    return {
        "name": "refusal",
        "seed": seed,
        "model": {
            "vocab_size": 4096,
            "hidden_size": 128,
            "layers": 2,
            "heads": 2,
            "intermediate_size": 384,
            "max_length": 512,
        },
        "data": {"train": [_source(folder, "train")], "too_long": "cut_or_drop"},
        "loss": {"decision": {"q": q, "gamma": gamma, "weight": 1}, "text": {"weight": 0}},
        "optimisation": {
            "epochs": epochs,
            "batch_size": 32,
            "learning_rate": learning_rate,
            "warmup_ratio": 0.06,
            "weight_decay": 0.05,
            "beta2": 0.98,
            "max_length": MAX_LENGTH,
            "save_every": 0,
            "fused_head": True,  # Only the learnt places get logits: one a row.
        },
    }


def train_once(training: Training, folder: Path, epochs: float) -> dict[str, Any]:
    """Trains once.

    Returns:
        `history`: on the way, metrics on a fixed sample of the measured rows, with their `step`;
        `final`: the metrics on all of them.
    """
    import torch
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from training.assembly import Watch, assemble
    from training.start import start_of
    from training.trainer import Rhythm

    torch.set_num_threads(1)
    q, gamma, rate, seed, measured = training
    config = _config(folder, epochs, rate, seed, q, gamma)
    world = _world(folder)
    on_the_way, whole = (_monitor(folder, measured, most) for most in (ROWS_ON_THE_WAY, None))
    watch = Watch(Rhythm(log=0.0, evaluate=EVERY), monitor=on_the_way)
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


def search_once(asked: Search, folder: Path, epochs: float) -> dict[str, Any]:
    """Returns what `auto` chooses: `q`, `gamma`, `reason`, and what that cost."""
    import torch

    from training.search import search
    from training.start import start_of

    torch.set_num_threads(1)
    config = _config(folder, epochs, asked.learning_rate, asked.seed, "auto", "auto")
    rows = _world(folder).rows
    with tempfile.TemporaryDirectory() as made:
        found = search(config, start_of(config, rows), rows, Path(made)).search
    return {**found.best._asdict(), "reason": found.reason, "cost_in_trainings": found.cost}


def _config(folder: Path, epochs: float, *values: Any) -> Any:
    from training.config import TrainConfig

    return TrainConfig.model_validate(recipe(folder, epochs, *values))


@cache
def _world(folder: Path) -> _World:
    """Returns what all trainings share: rows, tokenizer, and the rows as tokens."""
    from training.data import encode_rows
    from training.mixture import decision_weights, gather
    from training.start import start_of

    config = _config(folder, 1, 1e-3, 0, 0, 0)
    rows = gather(config.data, config.categories, demo_folder=None, single_token=False).rows
    start = start_of(config, rows)
    weights = decision_weights(rows, config.data, config.loss)
    examples = encode_rows(
        rows, start.tokenizer, start.manifest, weights, MAX_LENGTH, config.data.too_long
    )
    return _World(rows, start.tokenizer, start.manifest, examples)


@cache
def _monitor(folder: Path, measured: str, most: int | None) -> Any:
    from training.config import EvaluationConfig
    from training.mixture import evaluation_rows
    from training.monitor import DecisionMonitor

    world = _world(folder)
    config = _config(folder, 1, 1e-3, 0, 0, 0)
    chosen = EvaluationConfig.model_validate({"data": [_source(folder, measured)]})
    rows = evaluation_rows(
        chosen.data,
        config.categories,
        limit=most or 10**9,
        seed=0,
        demo_folder=None,
        single_token=False,
    )
    return DecisionMonitor(
        rows,
        world.tokenizer,
        world.manifest,
        max_length=config.model.max_length,
        too_long="cut_or_drop",
        text_rows=0,
    )


def _source(folder: Path, part: str) -> dict[str, Any]:
    return {"path": str(folder / PARTS[part]), "columns": {"response": None}}
