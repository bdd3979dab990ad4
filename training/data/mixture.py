"""Rows of several sources, made into one set: checked, deduplicated, drawn and weighed."""

import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from models.errors import ConfigError
from models.tokens import SINGLE
from training.config.data import DEMO, DataConfig, Origin, Source
from training.config.loss import LossConfig
from training.config.recipe import RESPOND
from training.data.encoding import DecisionWeights
from training.data.rows import Message, Record, Refused, Row, checked, complaint, with_one_category
from training.data.sources import Reading, draw, read, take
from training.data.variations import varied

MAX_CONFLICTS = 5
MAX_PAIRS = 10
PROMPT_CHARACTERS = 80

PromptKey = tuple[tuple[str, str], ...]


class SourceCounts(NamedTuple):
    """What became of one source.

    Attributes:
        left_out: Rows that could not, and were left out.
        why: One line for each reason of that.
        duplicates: Rows that say what an earlier row says.
        taken: Rows in the mixture, by category; None stands for the answers.
    """

    name: str
    read: int
    left_out: int
    why: str
    duplicates: int
    taken: Counter[str | None]


class Mixture(NamedTuple):
    """What is learnt from, and how it came to be.

    Attributes:
        rows: The rows, as often as they are taken.
        conflicts: Prompts that come with several decisions and are no pair.
        conflict_examples: The first of them, one line each.
        near_misses: Rows in the mixture that look like a category and are to be answered.
        pairs: Counterfactual pairs in the mixture.
        variations: Varied copies in the mixture; they count in no source.
        without_response: Rows in the mixture of which only the control token is learnt.
    """

    rows: list[Row]
    sources: tuple[SourceCounts, ...]
    deduplicated: bool
    conflicts: int
    conflict_examples: tuple[str, ...]
    near_misses: Counter[str]
    pairs: int
    variations: int
    without_response: int

    @property
    def categories(self) -> Counter[str | None]:
        """Rows by category; None stands for the answers."""
        return sum((source.taken for source in self.sources), Counter[str | None]())

    def summary(self) -> dict[str, Any]:
        """Returns the counts in a form that can be written as JSON."""
        return {
            "rows": len(self.rows),
            "categories": _named(self.categories),
            "sources": {
                source.name: {
                    "read": source.read,
                    "left_out": source.left_out,
                    "duplicates": source.duplicates,
                    "taken": _named(source.taken),
                }
                for source in self.sources
            },
            "deduplicated": self.deduplicated,
            "conflicts": self.conflicts,
            "near_misses": dict(self.near_misses),
            "pairs": self.pairs,
            "variations": self.variations,
            "without_response": self.without_response,
        }


def gather(
    data: DataConfig,
    categories: Collection[str],
    *,
    single_token: bool = False,
) -> Mixture:
    """Reads the training data and mixes them.

    Rows are deduplicated first, then each source is limited and weighted. Draws depend on
    `data.seed` and the source's place in the list alone, and never tear a pair apart.

    Args:
        categories: The names that a row may give as its category.
        single_token: Whether every category becomes the one category `refuse`.
    """
    readings = _read_all(data.train, categories, data.seed, "train", single_token)
    _check_pairs([row for _, reading in readings for row in reading.rows])
    conflicts = _conflicts([row for _, reading in readings for row in reading.rows])
    repeated = _repeated([reading.rows for _, reading in readings])
    rows: list[Row] = []
    counts: list[SourceCounts] = []
    for number, (source, reading) in enumerate(readings):
        twice = {id(row) for row in reading.rows if id(row) in repeated}
        kept = [row for row in reading.rows if not (data.deduplicate and id(row) in twice)]
        taken = take(kept, source, random.Random(f"{data.seed}/{number}"))
        rows += taken
        counts.append(
            SourceCounts(
                name=source.name,
                read=len(reading.rows),
                left_out=reading.left_out_rows,
                why=reading.left_out,
                duplicates=len(twice),
                taken=Counter(row.category for row in taken),
            )
        )
    if not rows:
        raise ConfigError(f"data.train: no row is left of {', '.join(c.name for c in counts)}")
    copies = varied(rows, data.variations, random.Random(f"{data.seed}/variations"))
    rows += copies
    return Mixture(
        rows=rows,
        sources=tuple(counts),
        deduplicated=data.deduplicate,
        conflicts=len(conflicts),
        conflict_examples=tuple(conflicts[:MAX_CONFLICTS]),
        near_misses=Counter(row.near_miss for row in rows if row.near_miss is not None),
        pairs=len({_pair_key(row) for row in rows if row.pair is not None}),
        variations=len(copies),
        without_response=sum(row.response is None for row in rows),
    )


def evaluation_rows(
    origin: Origin,
    categories: Collection[str],
    *,
    limit: int,
    seed: int,
    single_token: bool = False,
) -> list[Row]:
    """Reads what is measured during the training.

    Args:
        origin: Sources, or `demo`: the demo's calibration rows.
        limit: At most so many rows, drawn at random, in their order.
    """
    readings = _read_all(origin, categories, seed, "calibration", single_token)
    return draw(readings, limit, seed)


def decision_weights(rows: Sequence[Row], data: DataConfig, loss: LossConfig) -> DecisionWeights:
    """Returns the loss weights of all tokens, class balance and near misses counted in.

    With `data.balance` b, the decisions of a category whose weights sum to S sum to S**(1 - b)
    afterwards, times what leaves the sum over all categories as it was.
    """
    weights = DecisionWeights(
        plain=loss.decision.weight,
        pair=loss.decision.pair_weight,
        text=loss.text.weight,
        near_miss=data.near_miss_weight,
    )
    if not data.balance:
        return weights
    sums: dict[str | None, float] = defaultdict(float)
    for row in rows:
        turns = (turn for turn in row.messages if turn.role == "assistant")
        for turn, weight in zip(turns, weights.of_decisions(row), strict=True):
            sums[turn.category] += weight
    total = sum(sums.values())
    scale = total / (sum(s ** (1 - data.balance) for s in sums.values() if s) or 1.0)
    factors = {name: scale * s**-data.balance for name, s in sums.items() if s}
    return weights._replace(factors=factors)


# --- reading --------------------------------------------------------------------------------------


def _read_all(
    origin: Origin,
    categories: Collection[str],
    seed: int,
    split: str,
    single_token: bool,
) -> list[tuple[Source, Reading]]:
    known = [*categories, SINGLE] if single_token else categories
    if isinstance(origin, str):
        readings = [_read_demo(known, seed, split)]
    else:
        readings = [(source, read(source, known)) for source in origin]
    if not single_token:
        return readings
    return [
        (source, reading._replace(rows=[with_one_category(row, SINGLE) for row in reading.rows]))
        for source, reading in readings
    ]


def _read_demo(categories: Collection[str], seed: int, split: str) -> tuple[Source, Reading]:
    from training.demo_data.render import render

    source = Source(path=f"{DEMO}/{split}")
    refused: list[Refused] = []
    records = (
        Record(dict(values), source.name, number, "row")
        for number, values in enumerate(render(seed)[split], start=1)
    )
    rows = list(checked(records, categories, refused))
    if refused:
        raise ConfigError(complaint(refused))
    return source, Reading(rows, "", 0)


# --- what rows say of each other ------------------------------------------------------------------


def normalised(text: str) -> str:
    """Returns a text without case, Unicode form (NFKC) and the kind of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_key(row: Row) -> PromptKey:
    """Returns what two rows that ask the same have in common."""
    return conversation_key(row.prompt)


def conversation_key(turns: Iterable[Message]) -> PromptKey:
    """Returns what two conversations that say the same have in common."""
    return tuple((turn.role, normalised(turn.content)) for turn in turns)


def _pair_key(row: Row) -> tuple[str | None, PromptKey]:
    return row.pair, prompt_key(row)


def _check_pairs(rows: Sequence[Row]) -> None:
    pairs: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if row.pair is not None:
            pairs[_pair_key(row)].append(row)
    torn = [pair for pair in pairs.values() if len({row.category is None for row in pair}) == 1]
    if not torn:
        return
    lines = [
        f"{pair[0].origin}: pair {pair[0].pair!r} has no "
        f"{'refused' if pair[0].category is None else 'answered'} row of this prompt"
        for pair in torn[:MAX_PAIRS]
    ]
    if len(torn) > MAX_PAIRS:
        lines.append(f"and {len(torn) - MAX_PAIRS} more pairs")
    lines.append(
        "a pair is one prompt, once refused and once answered; for a prompt that only looks like "
        "one to refuse use near_miss"
    )
    raise ConfigError("\n".join(lines))


def _conflicts(rows: Sequence[Row]) -> list[str]:
    decided: dict[PromptKey, Row] = {}
    conflicts: dict[PromptKey, str] = {}
    for row in rows:
        if row.pair is not None:
            continue
        key = prompt_key(row)
        first = decided.setdefault(key, row)
        if first.category != row.category and key not in conflicts:
            conflicts[key] = (
                f"{first.origin} says {first.category or RESPOND}, {row.origin} says "
                f"{row.category or RESPOND}: {_short(row.prompt[-1].content)!r}"
            )
    return list(conflicts.values())


def _short(text: str) -> str:
    return text if len(text) <= PROMPT_CHARACTERS else f"{text[:PROMPT_CHARACTERS]}…"


def _repeated(sources: Sequence[Sequence[Row]]) -> set[int]:
    """Returns the identities of the rows that say what another row says.

    Of rows that say the same, the first one with a response stays, or else the first one.
    """
    stays: dict[Any, Row] = {}
    repeated: set[int] = set()
    for row in (row for rows in sources for row in rows):
        key = (*_pair_key(row), row.category)
        first = stays.setdefault(key, row)
        if first is row:
            continue
        if first.response is None and row.response is not None:
            stays[key], row = row, first
        repeated.add(id(row))
    return repeated


def _named(counts: Counter[str | None]) -> dict[str, int]:
    return {name or RESPOND: number for name, number in counts.items()}
