"""Training rows turned into token ids with a loss weight for each."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from models.errors import ConfigError
from models.manifest import Manifest
from training.config.data import TooLong
from training.data.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 2048
ROWS_WORTH_A_BAR = 10_000

Chat = list[dict[str, str]]


class Example(NamedTuple):
    """A row as the model sees it.

    Attributes:
        input_ids: `[tokens]` the whole conversation.
        weights: `[tokens]` loss weight of each token; 0 where nothing is learnt.
    """

    input_ids: list[int]
    weights: list[float]


class DecisionWeights(NamedTuple):
    """Loss weights of the tokens.

    Attributes:
        plain: Of the control tokens in an ordinary row.
        pair: Of the control tokens in a row of a counterfactual pair.
        text: Of every other token of the assistant.
        near_miss: Times this, where a prompt only looks as if it were to be refused.
        factors: Times this, by the decision's category; None stands for the answers. What is not
            named counts once.
    """

    plain: float
    pair: float
    text: float = 1.0
    near_miss: float = 1.0
    factors: Mapping[str | None, float] = MappingProxyType({})

    def of_decisions(self, row: Row) -> list[float]:
        """Returns the weight of each assistant turn's control token."""
        base = self.plain if row.pair is None else self.pair
        weights = [
            base * self.factors.get(turn.category, 1.0)
            for turn in row.messages
            if turn.role == "assistant"
        ]
        if row.near_miss is not None:
            weights[-1] *= self.near_miss
        return weights


def encode_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    manifest: Manifest,
    weights: DecisionWeights,
    max_length: int | None,
    too_long: TooLong = "cut",
) -> list[Example]:
    """Renders rows with the chat template and weighs their tokens.

    Every assistant turn opens with its control token. What it says, from the control token to the
    end-of-turn token, is learnt; what the others say is not. A row without a response ends with its
    control token. Where a turn begins is where its control token stands, and it must stand right
    after what the template prints when it asks for an answer, as it will when serving; so any
    template will do whose turns do not change when more follow.

    Args:
        max_length: Longest example, in tokens; None for any length.

    Returns:
        An example a row, in their order; fewer where `too_long` is `drop` or `cut_or_drop`.

    Raises:
        ConfigError: A row's text holds a control token, nothing of a row is left to learn, rows are
            too long and must not be, or the template does not render one in the way described.
    """
    encoder = _Encoder(tokenizer, manifest, weights)
    examples: list[Example] = []
    with _progress(len(rows)) as advance:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chunk = rows[start : start + ROWS_AT_ONCE]
            examples += encoder.encode(chunk)
            advance(len(chunk))
    return examples if max_length is None else fit(rows, examples, max_length, too_long)


def fit(
    rows: Sequence[Row], examples: Sequence[Example], max_length: int, too_long: TooLong
) -> list[Example]:
    """Does what `encode_rows` does with examples that are too long.

    Raises:
        ConfigError: Examples are too long and must not be, or nothing is left to learn of one or
            of all.
    """
    kept = [fit_one(example, max_length, too_long) for example in examples]
    if too_long in ("cut", "error"):
        over = [row.origin for row, fitting in zip(rows, kept, strict=True) if fitting is None]
        if over:
            raise ConfigError(_over_complaint(over, max_length, too_long))
    fitting = [example for example in kept if example is not None]
    if fitting and not any(weight > 0 for example in fitting for weight in example.weights):
        raise ConfigError(
            "data.train: nothing would be learnt: the loss weighs 0 for every token; raise "
            "loss.text.weight, or loss.decision.pair_weight where all rows are pairs"
        )
    return fitting


def fit_one(example: Example, max_length: int, too_long: TooLong) -> Example | None:
    """Returns what is kept of an example; None where that is nothing."""
    ids, weights = example
    if len(ids) <= max_length:
        return example
    if too_long not in ("cut", "cut_or_drop"):
        return None
    kept = weights[:max_length]
    # The decision alone would teach a refusal or an answer without its first word.
    if sum(weight > 0 for weight in kept) < min(2, sum(weight > 0 for weight in weights)):
        return None
    return Example(ids[:max_length], kept)


def _over_complaint(over: Sequence[str], max_length: int, too_long: TooLong) -> str:
    first = over[0]
    more = f" (and of {len(over) - 1} more rows)" if len(over) > 1 else ""
    if too_long == "cut":
        return (
            f"{first}: nothing of the response is left within {max_length} tokens{more}; raise "
            "optimisation.max_length, or leave such rows out with data.too_long: cut_or_drop"
        )
    more = f" (and {len(over) - 1} more rows)" if len(over) > 1 else ""
    return (
        f"{first}: has more than {max_length} tokens{more}; raise optimisation.max_length, or set "
        "data.too_long to cut_or_drop or drop"
    )


@contextmanager
def _progress(rows: int) -> "Iterator[Callable[[int], None]]":
    from rich.console import Console
    from rich.progress import Progress

    silent = rows < ROWS_WORTH_A_BAR or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=silent) as bar:
        task = bar.add_task("encoding rows", total=rows)
        yield lambda done: bar.advance(task, done)


class _Turn(NamedTuple):
    """An assistant turn in the rendered conversation."""

    before: str
    through: str
    control_id: int


class _Encoder:
    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", manifest: Manifest, weights: DecisionWeights
    ) -> None:
        self._tokenizer = tokenizer
        self._weights = weights
        self._controls: dict[str | None, Any] = {c.name: c for c in manifest.categories}
        self._controls[None] = manifest.respond
        self._tokens = [control.token for control in manifest.control_tokens]
        self._control_ids = frozenset(manifest.control_ids)
        self._end_id = tokenizer.eos_token_id
        self._end = str(tokenizer.eos_token or "")

    def encode(self, rows: Sequence[Row]) -> Iterator[Example]:
        rendered = self._render(rows)
        texts = [turns[-1].through for turns in rendered]
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            # `fit` handles rows that are longer than the model is made for.
            verbose=False,
        )["input_ids"]
        for row, turns, ids in zip(rows, rendered, encoded, strict=True):
            yield self._weigh(row, turns, ids)

    def _render(self, rows: Sequence[Row]) -> list[list[_Turn]]:
        chats = [self._chat(row) for row in rows]
        try:
            rendered = self._render_chats(chats)
        except _TemplateError:
            for row, chat in zip(rows, chats, strict=True):
                self._render_one(row, chat)
            raise
        for row, turns in zip(rows, rendered, strict=True):
            self._check_stable(row, turns)
        return rendered

    def _chat(self, row: Row) -> Chat:
        chat = []
        for turn in row.messages:
            for token in self._tokens:
                if token in turn.content:
                    raise _typed_control_token(row, token)
            control = self._controls[turn.category].token if turn.role == "assistant" else ""
            chat.append({"role": turn.role, "content": control + turn.content})
        return chat

    def _render_one(self, row: Row, chat: Chat) -> None:
        try:
            self._render_chats([chat])
        except _TemplateError as error:
            raise ConfigError(
                f"{row.origin}: the chat template does not take this conversation: {error}"
            ) from error

    def _render_chats(self, chats: Sequence[Chat]) -> list[list[_Turn]]:
        places = [
            (number, position)
            for number, chat in enumerate(chats)
            for position, turn in enumerate(chat)
            if turn["role"] == "assistant"
        ]
        befores = self._apply([chats[n][:position] for n, position in places], asking=True)
        throughs = self._apply([chats[n][: position + 1] for n, position in places], asking=False)
        rendered: list[list[_Turn]] = [[] for _ in chats]
        for (n, position), before, through in zip(places, befores, throughs, strict=True):
            content = chats[n][position]["content"]
            if content in self._tokens:
                through = before + content
            control = next(t for t in self._controls.values() if content.startswith(t.token))
            rendered[n].append(_Turn(before, through, control.id))
        return rendered

    def _apply(self, chats: Sequence[Chat], *, asking: bool) -> list[str]:
        try:
            texts: Any = self._tokenizer.apply_chat_template(
                list(chats), tokenize=False, add_generation_prompt=asking
            )
        except Exception as error:  # A template is a program: it may fail in any way.
            raise _TemplateError(" ".join(str(error).split())) from error
        return list(texts)

    def _check_stable(self, row: Row, turns: Sequence[_Turn]) -> None:
        whole = turns[-1].through
        spoken = (turn for turn in row.messages if turn.role == "assistant")
        tokens = [self._controls[turn.category].token for turn in spoken]
        for turn, token in zip(turns, tokens, strict=True):
            if not (whole.startswith(token, len(turn.before)) and whole.startswith(turn.before)):
                raise _unstable(row)

    def _weigh(self, row: Row, turns: Sequence[_Turn], ids: list[int]) -> Example:
        starts = self._starts(row, turns, ids)
        weights = [0.0] * len(ids)
        stop = len(ids)
        for start, turn, decision in zip(
            starts, turns, self._weights.of_decisions(row), strict=True
        ):
            stop = self._stop(turn, ids, start) or self._stop_by_text(row, turn, turns, ids)
            weights[start:stop] = [decision, *[self._weights.text] * (stop - start - 1)]
        return Example(ids[:stop], weights[:stop])

    def _starts(self, row: Row, turns: Sequence[_Turn], ids: list[int]) -> list[int]:
        """Returns where the turns' control tokens stand, and holds that there are no others."""
        starts: list[int] = []
        # list.index and list.count: a loop in Python over every token took a fifth of the time.
        if sum(map(ids.count, self._control_ids)) == len(turns):
            for turn in turns:
                after = starts[-1] + 1 if starts else 0
                if turn.control_id in ids[after:]:
                    starts.append(ids.index(turn.control_id, after))
        if len(starts) != len(turns):
            raise _typed_control_token(row, " or ".join(self._tokens))
        return starts

    def _stop(self, turn: _Turn, ids: list[int], start: int) -> int | None:
        """Returns where a turn ends: after its end-of-turn token, before what a template adds."""
        if not self._end or turn.through.count(self._end) == turn.before.count(self._end):
            return None
        return ids.index(self._end_id, start) + 1 if self._end_id in ids[start:] else None

    def _stop_by_text(self, row: Row, turn: _Turn, turns: Sequence[_Turn], ids: list[int]) -> int:
        """Does so where the template closes the assistant's turns with another token, or none."""
        if turn is turns[-1]:
            return len(ids)
        through: list[int] = self._tokenizer(turn.through, add_special_tokens=False)["input_ids"]
        if ids[: len(through)] != through:
            raise _unstable(row)
        return len(through)


class _TemplateError(ConfigError):
    pass


def _typed_control_token(row: Row, token: str) -> ConfigError:
    return ConfigError(
        f"{row.origin}: the text holds the control token {token!r}; it is put in front of each "
        "response by the training, never by the data"
    )


def _unstable(row: Row) -> ConfigError:
    return ConfigError(
        f"{row.origin}: the chat template renders an earlier turn differently once the "
        "assistant's turn follows; rows of several turns cannot be used with it"
    )
