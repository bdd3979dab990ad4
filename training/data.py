"""Training rows: read, checked, and turned into token ids with a loss weight for each."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from models.errors import ConfigError
from models.manifest import Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Message(BaseModel):
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said, without control token.
        category: Why an assistant turn refuses; None where it answers, and for the other roles.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: Text
    category: str | None = None


class _PromptRow(BaseModel):
    # Other fields say where a row comes from and are not ours to check. `category` has no
    # default: misspelt, it would turn every refusal into an answer.
    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: Text
    category: str | None
    response: Text
    answer: str | None = None
    pair: str | None = None

    def turns(self) -> tuple[Message, ...]:
        asked = Message(role="user", content=self.prompt)
        return (
            asked,
            Message(role="assistant", content=self.response, category=self.category),
        )


class _ConversationRow(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    messages: Annotated[tuple[Message, ...], Field(min_length=2)]
    answer: str | None = None
    pair: str | None = None

    def turns(self) -> tuple[Message, ...]:
        return self.messages


@dataclass(frozen=True)
class Row:
    """One conversation that ends with the assistant.

    Attributes:
        messages: Its turns; the last one is the assistant's.
        answer: What a right answer contains, where that can be checked.
        pair: What the rows of a counterfactual pair share.
        origin: File and line.
    """

    messages: tuple[Message, ...]
    answer: str | None
    pair: str | None
    origin: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last answer."""
        return self.messages[:-1]

    @property
    def category(self) -> str | None:
        """Why the last turn refuses; None where it answers."""
        return self.messages[-1].category

    @property
    def response(self) -> str:
        """The text of the last turn."""
        return self.messages[-1].content


class Example(NamedTuple):
    """A row as the model sees it.

    Attributes:
        input_ids: `[tokens]` the whole conversation.
        weights: `[tokens]` loss weight of each token; 0 where nothing is learnt.
    """

    input_ids: list[int]
    weights: list[float]


class DecisionWeights(NamedTuple):
    """Loss weights of the control tokens.

    Attributes:
        plain: In an ordinary row.
        pair: In a row of a counterfactual pair.
    """

    plain: float
    pair: float


def read_rows(path: Path, categories: Collection[str]) -> list[Row]:
    """Reads a JSONL file.

    A row is either `{"prompt", "category", "response"}` or `{"messages": [...]}`, whose assistant
    turns carry a `category`; null means that the response answers. `answer` and `pair` are
    optional, other fields are not read.

    Args:
        path: The file.
        categories: The names that a row may give as its category.

    Raises:
        ConfigError: The file cannot be read or holds no rows, or a row is wrong: the message names
            file, line and reason.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    rows = [
        _parse(line, f"{path}:{number}", categories)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not rows:
        raise ConfigError(f"{path}: holds no rows")
    return rows


def encode_rows(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    manifest: Manifest,
    weights: DecisionWeights,
    max_length: int,
) -> list[Example]:
    """Renders rows with the chat template and weighs their tokens.

    Every assistant turn opens with its control token. What it says, from the control token to the
    end-of-turn token, is learnt; what the others say is not. Where a turn begins and ends is found
    by rendering the conversation up to it and through it, so that any template will do whose turns
    do not change when more follow.

    Args:
        rows: The rows.
        tokenizer: It holds the control tokens and a chat template.
        manifest: Names the control tokens.
        weights: Loss weights of the control tokens.
        max_length: Longer rows are cut at their end, in tokens.

    Raises:
        ConfigError: A row's text holds a control token, nothing of a row is left to learn, or the
            template does not render it in the way described.
    """
    rendered = [_render(row, tokenizer, manifest) for row in rows]
    texts = [text for cuts in rendered for cut in cuts for text in cut]
    encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    return [
        _weigh(
            row,
            [(next(encoded), next(encoded)) for _ in cuts],
            tokenizer.eos_token_id,
            weights.plain if row.pair is None else weights.pair,
            max_length,
        )
        for row, cuts in zip(rows, rendered, strict=True)
    ]


def _parse(line: str, origin: str, categories: Collection[str]) -> Row:
    try:
        values: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{origin}: is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{origin}: must be a JSON object, one a line")
    kind = _ConversationRow if "messages" in values else _PromptRow
    try:
        row: _ConversationRow | _PromptRow = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{origin}: {where}: {first['msg']}") from error
    turns = row.turns()
    _check_turns(turns, origin, categories)
    return Row(turns, row.answer, row.pair, origin)


def _check_turns(turns: Sequence[Message], origin: str, categories: Collection[str]) -> None:
    if turns[-1].role != "assistant":
        raise ConfigError(f"{origin}: the last message must be the assistant's")
    for turn in turns:
        if turn.category is None:
            continue
        if turn.role != "assistant":
            raise ConfigError(f"{origin}: only assistant messages have a category")
        if turn.category not in categories:
            known = ", ".join(categories)
            raise ConfigError(
                f"{origin}: category {turn.category!r} is unknown; known are {known}, and null "
                "where the response answers"
            )


def _render(
    row: Row, tokenizer: "PreTrainedTokenizerBase", manifest: Manifest
) -> list[tuple[str, str]]:
    """Returns the conversation up to and through each assistant turn."""
    _check_free_of_control_tokens(row, manifest)
    tokens: dict[str | None, str] = {c.name: c.token for c in manifest.categories}
    tokens[None] = manifest.respond.token
    turns = [
        {
            "role": turn.role,
            "content": tokens[turn.category] + turn.content
            if turn.role == "assistant"
            else turn.content,
        }
        for turn in row.messages
    ]
    return list(_cuts(turns, tokenizer))


def _cuts(
    turns: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[str, str]]:
    for position, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                turns[:position], tokenize=False, add_generation_prompt=True
            )
            through = tokenizer.apply_chat_template(turns[: position + 1], tokenize=False)
            yield str(before), str(through)


def _check_free_of_control_tokens(row: Row, manifest: Manifest) -> None:
    for turn in row.messages:
        for control in manifest.control_tokens:
            if control.token in turn.content:
                raise ConfigError(
                    f"{row.origin}: the text holds the control token {control.token!r}; it is put "
                    "in front of each response by the training, never by the data"
                )


def _weigh(
    row: Row,
    cuts: Sequence[tuple[list[int], list[int]]],
    end_of_turn: int | None,
    decision_weight: float,
    max_length: int,
) -> Example:
    ids = cuts[-1][1]
    weights = [0.0] * len(ids)
    stop = len(ids)
    for before, through in cuts:
        start = len(before)
        if through[:start] != before or ids[: len(through)] != through:
            raise ConfigError(
                f"{row.origin}: the chat template renders an earlier turn differently once the "
                "assistant's turn follows; rows of several turns cannot be used with it"
            )
        stop = _end(through, start, end_of_turn)
        weights[start:stop] = [decision_weight, *[1.0] * (stop - start - 1)]
    if len(cuts[0][0]) + 2 > max_length:
        raise ConfigError(
            f"{row.origin}: nothing of the response is left within {max_length} tokens; raise "
            "optimisation.max_length or take the row out"
        )
    stop = min(stop, max_length)
    return Example(ids[:stop], weights[:stop])


def _end(ids: list[int], start: int, end_of_turn: int | None) -> int:
    """Returns where a turn ends: after its end-of-turn token, before what a template adds."""
    if end_of_turn in ids[start:]:
        return ids.index(end_of_turn, start) + 1
    return len(ids)
