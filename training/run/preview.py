"""What a training would learn from: counts, lengths, samples and time; nothing is written."""

import random
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from models.errors import CheckpointError, ConfigError
from models.manifest import Manifest
from models.tokens import add_control_tokens
from training.config.recipe import RESPOND, CheckpointModel, ScratchModel, TrainConfig
from training.data.encoding import DecisionWeights, Example, encode_rows, fit
from training.data.mixture import Mixture, decision_weights, gather, prompt_key
from training.data.rows import Row
from training.measure.held_out import held_out_monitor, held_out_rows
from training.model.gguf import is_gguf, model_folder
from training.model.start import Start, model_config, start_of, tokenizer_of
from training.run.auto import BUDGETS, CANDIDATES, KEEP, inner_split, is_auto

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from training.measure.monitor import DecisionMonitor
    from training.run.estimate import Timing, Work

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SAMPLES_A_KIND = 2
RUN_CHARACTERS = 320
NOT_HERE = "the model's weights are not on this machine"
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)

WARNING = "yellow"
CONTROL = "bold reverse magenta"
LEARNT = "green"
NOT_LEARNT = "dim"


class Words(NamedTuple):
    """What makes text into tokens.

    Attributes:
        config: The model's configuration.
        start: What the training begins with; None where the weights are not here.
        why_not: Why there is no start.
    """

    tokenizer: "PreTrainedTokenizerBase"
    manifest: Manifest
    config: Any
    start: Start | None
    why_not: str = ""


def dry_run(config: TrainConfig, console: Console) -> None:
    """Shows what a recipe would learn from and how long that takes, and writes nothing.

    Raises:
        ConfigError: The data are wrong or too few for `auto`, or those measured on cannot tell the
            metric that chooses the best weights.
        CheckpointError: The model to start from lies here and cannot be used.
    """
    mixture = gather(config.data, list(config.categories), single_token=config.single_token)
    console.print(_mixture_table(mixture))
    _print_lines(console, _remarks(mixture, config))
    held_out = held_out_rows(config)
    _print_lines(console, _evaluation_remarks(mixture, config, held_out))
    _print_lines(console, _search_remarks(mixture, config))
    try:
        words = _words(config, mixture.rows)
    except _UnreachableError as error:
        console.print(Text(f"Lengths, samples and time are not shown: {error}", WARNING))
        return
    weights = decision_weights(mixture.rows, config.data, config.loss)
    whole = encode_rows(mixture.rows, words.tokenizer, words.manifest, weights, None)
    console.print(_length_table(mixture.rows, whole, config))
    for panel in _samples(mixture.rows, whole, words, config):
        console.print(panel)
    console.print(_legend(weights))
    longest = config.optimisation.max_length
    examples = fit(mixture.rows, whole, longest, config.data.too_long)
    if left_out := len(whole) - len(examples):
        console.print(Text(f"Left out, because they are too long: {left_out:,} rows", WARNING))
    monitor = None
    if held_out is not None:
        monitor = held_out_monitor(config, held_out, words.tokenizer, words.manifest, words.config)
        if monitor.left_out:
            line = f"Not measured, because they are too long: {monitor.left_out:,} rows"
            console.print(Text(line, WARNING))
    _print_plan(config, words, examples, monitor, console)


def _print_lines(console: Console, lines: Iterable[Text]) -> None:
    for line in lines:
        # Not folded: file names stay whole.
        console.print(line, soft_wrap=True)


# --- counts ---------------------------------------------------------------------------------------


def _mixture_table(mixture: Mixture) -> Table:
    table = Table(title="Rows taken, by source and category", title_justify="left")
    table.add_column("source", overflow="fold", ratio=1)
    table.add_column("read", justify="right")
    table.add_column("category")
    table.add_column("taken", justify="right")
    for source in mixture.sources:
        _add_counts(table, source.name, source.read, source.taken)
    if len(mixture.sources) > 1:
        _add_counts(
            table, "all", sum(source.read for source in mixture.sources), mixture.categories
        )
    return table


def _add_counts(table: Table, name: str, read: int, taken: Counter[str | None]) -> None:
    cells = (Text(name), _number(read))
    for category in sorted(taken, key=lambda category: (category is None, category or "")):
        table.add_row(*cells, category or RESPOND, _number(taken[category]))
        cells = (Text(), "")
    table.add_row(*cells, Text("all", "bold"), Text(_number(taken.total()), "bold"))
    table.add_section()


def _number(value: int) -> str:
    return f"{value:,}"


def _remarks(mixture: Mixture, config: TrainConfig) -> Iterator[Text]:
    """Yields a line for everything that is not an ordinary row."""
    for source in mixture.sources:
        if source.left_out:
            yield Text(f"Left out of {source.name}: {source.left_out} bad rows", WARNING)
            yield Text(source.why, NOT_LEARNT)
    duplicates = sum(source.duplicates for source in mixture.sources)
    fate = "dropped" if mixture.deduplicated else "kept; data.deduplicate: true drops them"
    yield Text(f"Duplicates: {duplicates:,} ({fate})" if duplicates else "Duplicates: none")
    if mixture.conflicts:
        yield Text(f"Prompts with conflicting labels: {mixture.conflicts:,}, among them", WARNING)
        for example in mixture.conflict_examples:
            yield Text(f"  {example}", NOT_LEARNT)
    else:
        yield Text("Prompts with conflicting labels: none")
    near = ", ".join(f"{name} {n:,}" for name, n in mixture.near_misses.items())
    yield Text(f"Near misses: {near or 'none'}")
    yield Text(f"Counterfactual pairs: {mixture.pairs or 'none'}")
    if mixture.variations:
        yield Text(f"Varied copies (control token only): {mixture.variations:,}")
    if mixture.without_response:
        yield Text(f"Without a response (control token only): {mixture.without_response:,}")
    if empty := _without_rows(config, {name or RESPOND for name in mixture.categories}):
        yield Text(f"No row at all: {', '.join(empty)}", WARNING)


def _without_rows(config: TrainConfig, found: Container[str]) -> list[str]:
    return [name for name in sorted({*config.token_categories, RESPOND}) if name not in found]


def _evaluation_remarks(
    mixture: Mixture, config: TrainConfig, rows: Sequence[Row] | None
) -> Iterator[Text]:
    if rows is None:
        yield Text("Measured on the way: nothing, so the last weights are kept")
        return
    counts = Counter(row.category or RESPOND for row in rows)
    counted = ", ".join(f"{name} {n:,}" for name, n in counts.items())
    yield Text(f"Measured on the way: {len(rows):,} rows ({counted})")
    if unmeasured := _without_rows(config, counts):
        yield Text(f"  No row at all: {', '.join(unmeasured)}", WARNING)
    trained = {prompt_key(row) for row in mixture.rows}
    if shared := sum(prompt_key(row) in trained for row in rows):
        yield Text(f"  {shared:,} of these prompts are also trained on", WARNING)


def _search_remarks(mixture: Mixture, config: TrainConfig) -> Iterator[Text]:
    if not is_auto(config.loss):
        return
    split = inner_split(mixture.rows, config.seed)
    shortest, longest = BUDGETS
    least = len(CANDIDATES) * shortest + KEEP[0] * longest
    # Cross-entropy is compared to the end, among those that are kept or beside them.
    yield Text(
        f"auto: q and gamma are chosen on {len(split.train):,} training rows and "
        f"{len(split.validation):,} others of them; that takes {least:.1f} to "
        f"{least + longest:.1f} times the steps below on top"
    )


# --- tokens ---------------------------------------------------------------------------------------


class _UnreachableError(CheckpointError):
    pass


def _words(config: TrainConfig, rows: Sequence[Row]) -> Words:
    if isinstance(config.model, ScratchModel):
        start = start_of(config, rows)
        return Words(start.tokenizer, start.manifest, start.config, start)
    folder = Path(config.model.checkpoint)
    if not folder.is_dir():
        folder = _fetched(config.model)
        if not any(folder.glob("*.safetensors")):
            return _without_weights(config, config.model, folder, NOT_HERE)
    here = config.model.model_copy(update={"checkpoint": str(folder), "revision": None})
    try:
        start = start_of(config.model_copy(update={"model": here}), rows)
    except ConfigError as error:
        # Where it is not the weights that are wrong, this ends the same way.
        return _without_weights(config, config.model, folder, error.message)
    return Words(start.tokenizer, start.manifest, start.config, start)


def _without_weights(config: TrainConfig, model: CheckpointModel, folder: Path, why: str) -> Words:
    tokenizer = tokenizer_of(model, folder)
    manifest = add_control_tokens(tokenizer, config.token_categories)
    return Words(tokenizer, manifest, model_config(folder), None, why)


def _fetched(model: CheckpointModel) -> Path:
    # A path that is not there is a mistake; a name on the hub may just be out of reach.
    if is_gguf(model.checkpoint) or not HUB_NAME.fullmatch(model.checkpoint):
        return model_folder(model)
    try:
        return model_folder(model, with_weights=False)
    except CheckpointError as error:
        raise _UnreachableError(error.message) from error


def _length_table(rows: Sequence[Row], examples: Sequence[Example], config: TrainConfig) -> Table:
    longest = config.optimisation.max_length
    table = Table(title=f"Tokens a row (max_length {longest})", title_justify="left")
    table.add_column("rows")
    fate = {"drop": "dropped", "error": "too long"}.get(config.data.too_long, "cut")
    for heading in ("shortest", "median", "90 %", "99 %", "longest", fate):
        table.add_column(heading, justify="right")
    lengths = np.array([len(example.input_ids) for example in examples])
    names = [row.category or RESPOND for row in rows]
    for name in sorted(set(names), key=lambda name: (name == RESPOND, name)):
        table.add_row(name, *_length_cells(lengths[[n == name for n in names]], longest))
    table.add_section()
    table.add_row("all", *_length_cells(lengths, longest))
    return table


def _length_cells(lengths: "np.ndarray[tuple[int], np.dtype[np.int64]]", longest: int) -> list[str]:
    quantiles = np.quantile(lengths, QUANTILES, method="nearest")
    return [*(_number(int(q)) for q in quantiles), f"{np.mean(lengths > longest):.1%}"]


def _samples(
    rows: Sequence[Row], examples: Sequence[Example], words: Words, config: TrainConfig
) -> Iterator[Panel]:
    rng = random.Random(config.data.seed)
    kinds: dict[str, list[int]] = {}
    # A row that is taken twice is one object, and shown once.
    for at, row in {id(row): (at, row) for at, row in enumerate(rows)}.values():
        kinds.setdefault(_kind(row), []).append(at)
    for kind in sorted(kinds):
        chosen = rng.sample(kinds[kind], min(SAMPLES_A_KIND, len(kinds[kind])))
        for at in sorted(chosen):
            text = rendered(examples[at], words.tokenizer, words.manifest)
            yield Panel(text, title=f"{kind} · {rows[at].origin}", title_align="left")


def _kind(row: Row) -> str:
    if row.pair is not None:
        return f"pair, {row.category or RESPOND}"
    if row.near_miss is not None:
        return f"near miss of {row.near_miss}"
    if row.response is None:
        return f"{row.category or RESPOND}, without response"
    return row.category or RESPOND


def rendered(example: Example, tokenizer: "PreTrainedTokenizerBase", manifest: Manifest) -> Text:
    """Returns an example as the model sees it, with what is learnt between « and »."""
    text = Text()
    controls = set(manifest.control_ids)
    tokens = list(zip(example.input_ids, example.weights, strict=True))
    for learnt, run in groupby(tokens, key=lambda token: token[1] > 0):
        text.append("«" if learnt else "", LEARNT)
        for control, part in groupby(run, key=lambda token: token[0] in controls):
            words = _visible(str(tokenizer.decode([token for token, _ in part])))
            text.append(words, CONTROL if control else LEARNT if learnt else NOT_LEARNT)
        text.append("»" if learnt else "", LEARNT)
    return text


def _visible(text: str) -> str:
    if len(text) > RUN_CHARACTERS:
        half = RUN_CHARACTERS // 2
        text = f"{text[:half]} […] {text[-half:]}"
    text = text.replace("\n", "⏎")
    # Nothing in the data may steer the terminal.
    return "".join(character if character.isprintable() else "�" for character in text)


def _legend(weights: DecisionWeights) -> Text:
    legend = Text("«…» is learnt, the rest is only read; a ")
    legend.append("control token", CONTROL)
    legend.append(
        f" weighs {weights.plain:g} (in a pair {weights.pair:g}, in a near miss times "
        f"{weights.near_miss:g}), every other learnt token {weights.text:g}. "
    )
    if weights.factors:
        factors = ", ".join(f"{n or RESPOND} {f:.2g}" for n, f in weights.factors.items())
        legend.append(f"Class balance multiplies decisions: {factors}.")
    return legend


# --- time -----------------------------------------------------------------------------------------


def _print_plan(
    config: TrainConfig,
    words: Words,
    examples: Sequence[Example],
    monitor: "DecisionMonitor | None",
    console: Console,
) -> None:
    from training.run.estimate import timed, work

    if config.train == "tokens":
        from training.run.tokens import prompts_of

        lengths = [len(p.ids) for e in examples for p in prompts_of(e, words.manifest)]
        counts = f"{len(lengths):,} prompts, {sum(lengths):,} tokens"
        console.print(Text(f"The training: one forward pass over {counts}, kept for the next run"))
        return
    done = work(examples, config.optimisation)
    timing, why = None, words.why_not
    if words.start is not None:
        try:
            timing = timed(config, words.start, examples, monitor)
        except ConfigError as error:
            why = error.message
    console.print(_plan(done, config, timing))
    if timing is None:
        console.print(Text(f"Time is not shown: {why}", WARNING))


def _plan(done: "Work", config: TrainConfig, timing: "Timing | None") -> Table:
    plan = Table(title="The training", title_justify="left", show_header=False)
    packed = f", packed into {done.sequences:,} sequences" if config.optimisation.packing else ""
    share = done.learnt / max(done.tokens, 1)
    plan.add_row("tokens an epoch", f"{done.tokens:,}{packed}; {share:.0%} of them learnt")
    epochs = config.optimisation.epochs
    plan.add_row("steps", f"{done.steps:,} in {epochs:g} epochs, on one process")
    if timing is None:
        return plan
    basis = f"{timing.steps} steps on this machine's {timing.device}, as busy as it is now"
    plan.add_row("time of the steps", f"about {_duration(timing.training_s)} (measured: {basis})")
    if timing.measurement_s is not None:
        whole = _duration(timing.measurements * timing.measurement_s)
        one = _duration(timing.measurement_s)
        plan.add_row(
            "time of the measurements", f"about {whole} ({timing.measurements} of {one} each)"
        )
    return plan


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.0f} s"
