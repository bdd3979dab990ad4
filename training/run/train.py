"""Trains a checkpoint from a recipe; a run that is killed goes on when it is started again."""

import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.checkpoint import load_checkpoint
from models.files import write_atomically
from training.config.loss import LossConfig
from training.config.recipe import TrainConfig
from training.data.encoding import encode_rows
from training.data.mixture import Mixture, decision_weights, gather
from training.data.rows import Row
from training.measure.held_out import held_out_monitor, held_out_rows
from training.model.start import Start, start_of
from training.run.auto import CHOICE_NAME, is_auto, read_choice, search, with_choice
from training.run.folder import (
    Identity,
    keeps,
    locked,
    mark_finished,
    open_partial,
    put_in_place,
)
from training.run.processes import Processes
from training.run.record import data_hashes, recipe_of, write_contract, write_log
from training.run.resume import ResumePoints

if TYPE_CHECKING:
    from training.measure.monitor import DecisionMonitor
    from training.run.trainer import ControlTokenTrainer

RESUME_FOLDER = "resume"
SEARCH_FOLDER = "search"


class _Run(NamedTuple):
    """What all parts of a run need."""

    config: TrainConfig
    hashes: dict[str, str]
    folder: Path
    processes: Processes
    points: ResumePoints

    def say(self, line: str) -> None:
        """Tells the user something, once."""
        if self.processes.is_main:
            from rich.console import Console

            Console(stderr=True).print(line, soft_wrap=True, markup=False, highlight=False)


def train(
    config: TrainConfig, out: Path, *, force: bool = False, replace_stale: bool = False
) -> Path:
    """Trains a checkpoint that can be served.

    Everything is written to a folder beside `out`, `OUT.partial`, that takes its name at the very
    end, so a folder called `out` is always a finished checkpoint. A run that was killed goes on
    from the last complete point in `OUT.partial` and reaches the same losses and weights. Several
    processes, started by `accelerate launch` or `torchrun`, share the steps; the first one writes.

    Args:
        out: The checkpoint's folder. A checkpoint that lies there already and was made from the
            same recipe and data is kept as it is.
        force: Whether to train again and replace a checkpoint that lies there.
        replace_stale: Whether to replace one of another recipe or other data, and keep one of
            this recipe.

    Raises:
        ConfigError: The recipe or its data are wrong, the memory does not suffice, another run
            writes there, or something else lies at `out`.
        CheckpointError: The model to start from cannot be loaded or could not be served.
        EvaluationError: The training diverged.
    """
    processes = Processes()
    with ExitStack() as held:
        # Held by the first process until the whole run ends.
        processes.on_main(lambda: held.enter_context(locked(out)))
        hashes = processes.on_main(lambda: data_hashes(config))
        recipe = recipe_of(config, hashes, config.loss)
        if processes.on_main(lambda: keeps(out, recipe, force=force, replace_stale=replace_stale)):
            return out
        identity = Identity(recipe.config_sha256, hashes, processes.count)
        partial = out.with_name(f"{out.name}.partial")
        opened = processes.on_main(lambda: open_partial(partial, identity))
        run = _Run(config, hashes, partial, processes, ResumePoints(partial / RESUME_FOLDER))
        if opened.discarded is not None:
            run.say(opened.discarded)
        if not opened.finished:
            _train_into(run)
        processes.on_main(lambda: _finish(run, identity, out))
    return out


def _finish(run: _Run, identity: Identity, out: Path) -> None:
    # From here on nothing is trained again, whenever the process is killed.
    mark_finished(run.folder, identity)
    run.points.remove()
    put_in_place(run.folder, out)


def _train_into(run: _Run) -> None:
    from training.run.assembly import memory_errors_explained

    config, seconds = run.config, dict[str, float]()
    evaluation = config.evaluation
    with _timed(seconds, "data_s"):
        mixture, held_out = run.processes.together(lambda: _read(run.config))
        _report_oddities(run, mixture)
    with _timed(seconds, "model_s"):
        start = run.processes.together(lambda: start_of(config, mixture.rows))
        run.processes.on_main(lambda: _write_contract(run, start, config.loss))
        if config.train == "tokens":
            _learn_tokens(run, start, mixture, held_out, seconds)
            return
        # Before the search for the loss, which may take longer than the training.
        monitor = run.processes.together(lambda: _monitor(run, start, held_out))
    with _timed(seconds, "loss_s"):
        loss = _resolved_loss(run, start, mixture)
        run.processes.on_main(lambda: _write_contract(run, start, loss))
    with _timed(seconds, "trainer_s"), memory_errors_explained():
        point = run.processes.on_main(run.points.open)
        trainer = _trainer(run, start, mixture, loss, monitor, resumed=point is not None)
        before = None
        if monitor is not None and evaluation is not None and evaluation.at_start:
            before = monitor.text_loss(trainer.model, control_tokens=False)
    with _timed(seconds, "training_s"), memory_errors_explained():
        if point is not None:
            run.say(f"{run.folder}: goes on after step {point.name.rpartition('-')[2]}")
        trainer.train(resume_from_checkpoint=None if point is None else str(point))
    with _timed(seconds, "saving_s"):
        summary = _closing(run, start, mixture, monitor, trainer, before)
    if run.processes.is_main:
        write_log(run.folder, [*trainer.state.log_history, *summary, seconds])


def _learn_tokens(
    run: _Run,
    start: Start,
    mixture: Mixture,
    held_out: list[Row] | None,
    seconds: dict[str, float],
) -> None:
    from training.run.tokens import check_one_process, learn_tokens

    check_one_process(run.processes.count)
    with _timed(seconds, "tokens_s"):
        lines = learn_tokens(run.config, start, mixture.rows, held_out, run.folder)
    write_log(run.folder, [{"data": mixture.summary()}, *lines, seconds])


def _read(config: TrainConfig) -> tuple[Mixture, list[Row] | None]:
    mixture = gather(config.data, config.categories, single_token=config.single_token)
    return mixture, held_out_rows(config)


def _write_contract(run: _Run, start: Start, loss: LossConfig) -> None:
    write_contract(run.folder, run.config, recipe_of(run.config, run.hashes, loss), start)
    # Before the training as well as after it: what could not be served is not trained.
    load_checkpoint(run.folder)


def _report_oddities(run: _Run, mixture: Mixture) -> None:
    for source in mixture.sources:
        if source.left_out:
            run.say(f"{source.name}: {source.left_out} rows are left out: {source.why}")
    if mixture.conflicts:
        run.say(f"{mixture.conflicts} prompts come with several decisions; see --dry-run")


def _resolved_loss(run: _Run, start: Start, mixture: Mixture) -> LossConfig:
    """Returns the losses without `auto`, which is searched for once and then read back."""
    if not is_auto(run.config.loss):
        return run.config.loss
    choice = read_choice(run.folder)
    if choice is None:
        run.say("auto: choosing q and gamma by short trainings on the training data")
        folder = run.folder / SEARCH_FOLDER
        found = search(run.config, start, mixture.rows, folder)
        run.processes.on_main(lambda: write_atomically(run.folder / CHOICE_NAME, found.to_json()))
        run.processes.on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
        run.say(f"auto: {found.reason}")
        choice = found.best
    return with_choice(run.config.loss, choice)


def _monitor(run: _Run, start: Start, rows: list[Row] | None) -> "DecisionMonitor | None":
    if rows is None:
        return None
    monitor = held_out_monitor(run.config, rows, start.tokenizer, start.manifest, start.config)
    if monitor.left_out:
        run.say(f"evaluation.data: {monitor.left_out} rows are left out: too long for the model")
    return monitor


def _trainer(
    run: _Run,
    start: Start,
    mixture: Mixture,
    loss: LossConfig,
    monitor: "DecisionMonitor | None",
    *,
    resumed: bool,
) -> "ControlTokenTrainer":
    from training.run.assembly import assemble
    from training.run.trainer import Rhythm, Watch

    config = run.config
    weights = decision_weights(mixture.rows, config.data, config.loss)
    examples = run.processes.together(
        lambda: encode_rows(
            mixture.rows,
            start.tokenizer,
            start.manifest,
            weights,
            config.optimisation.max_length,
            config.data.too_long,
        )
    )
    evaluation = config.evaluation
    rhythm = Rhythm(
        save=config.optimisation.save_every,
        evaluate=0.0 if evaluation is None else evaluation.every,
        evaluate_first=evaluation is not None and evaluation.at_start and not resumed,
    )
    best = "last" if evaluation is None else evaluation.best
    watch = Watch(rhythm, run.points, monitor, best, config.report_to)
    return assemble(config, start, examples, loss, run.folder, watch)


def _closing(
    run: _Run,
    start: Start,
    mixture: Mixture,
    monitor: "DecisionMonitor | None",
    trainer: "ControlTokenTrainer",
    text_loss_before: float | None,
) -> list[dict[str, Any]]:
    """Writes weights and figures; returns the last lines of the log."""
    from training.measure.figures import save_training_plots
    from training.run.export import export

    step = trainer.load_best()
    final = None if monitor is None else monitor.measure(trainer.model)
    export(trainer, start, run.folder, run.processes)
    lines: list[dict[str, Any]] = [{"data": mixture.summary()}]
    if final is not None:
        lines.append(
            {
                "kept_step": trainer.state.global_step if step is None else step,
                "text_loss_before": text_loss_before,
                "text_loss_after": final.metrics.get("text_loss"),
                "final": final.metrics,
            }
        )
    if run.processes.is_main:
        save_training_plots(run.folder, trainer.state.log_history, final)
    return lines


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = round(time.perf_counter() - began, 2)
