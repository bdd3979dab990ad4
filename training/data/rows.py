"""One row of training data: a conversation that ends with the assistant, and how it is checked."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from models.errors import ConfigError

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Mark = Annotated[str, Field(coerce_numbers_to_str=True)]

MAX_REASONS = 10
MAX_PLACES = 8

HINTS = {
    "category": " (null where the response answers)",
    "response": " (null where only the control token is to be learnt)",
}


class BadRowError(ConfigError):
    """A row that cannot be used; the message says why, the reader knows where."""


class Message(BaseModel):
    """One turn of a conversation.

    Attributes:
        content: What is said, without control token; empty only in a last turn of which nothing but
            the control token is learnt.
        category: Why an assistant turn refuses; None where it answers, and for the other roles.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: str
    category: str | None = None


@dataclass(frozen=True)
class Row:
    """One conversation that ends with the assistant.

    Attributes:
        answer: What a right answer contains, where that can be checked.
        pair: What the rows of a counterfactual pair share.
        near_miss: The category that the prompt looks like, where it is to be answered all the same.
    """

    messages: tuple[Message, ...]
    answer: str | None
    pair: str | None
    origin: str
    near_miss: str | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last answer."""
        return self.messages[:-1]

    @property
    def category(self) -> str | None:
        """Why the last turn refuses; None where it answers."""
        return self.messages[-1].category

    @property
    def response(self) -> str | None:
        """The text of the last turn; None where only its control token is learnt."""
        return self.messages[-1].content or None


def with_one_category(row: Row, name: str) -> Row:
    """Returns the row with every refusal, and what the prompt looks like, of one category."""
    messages = tuple(
        turn if turn.category is None else turn.model_copy(update={"category": name})
        for turn in row.messages
    )
    return replace(row, messages=messages, near_miss=row.near_miss and name)


class Record(NamedTuple):
    """A row as its file has it.

    Attributes:
        values: Its fields, or why it has none.
        number: Its line in a text file, as an editor counts; else its place among the rows.
    """

    values: Mapping[str, Any] | BadRowError
    file: str
    number: int
    unit: Literal["line", "row"]

    @property
    def origin(self) -> str:
        """`FILE:LINE`, or `FILE, row N`."""
        if self.unit == "line":
            return f"{self.file}:{self.number}"
        return f"{self.file}, row {self.number}"


class _Turn(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant"]
    content: Text | None
    category: str | None = None


class _MarkedRow(BaseModel):
    # Other fields say where a row comes from and are not ours to check.
    model_config = ConfigDict(extra="ignore", frozen=True)

    answer: Mark | None = None
    pair: Mark | None = None
    near_miss: str | None = None


class _PromptRow(_MarkedRow):
    # `category` and `response` have no default: misspelt, they would turn every refusal into an
    # answer or into no text.
    prompt: Text
    category: str | None
    response: Text | None

    def turns(self) -> tuple[Message, ...]:
        asked = Message(role="user", content=self.prompt)
        reply = Message(role="assistant", content=self.response or "", category=self.category)
        return asked, reply


class _ConversationRow(_MarkedRow):
    messages: Annotated[tuple[_Turn, ...], Field(min_length=2)]
    category: str | None = None

    def turns(self) -> tuple[Message, ...]:
        last = self.messages[-1]
        category = last.category
        if "category" in self.model_fields_set:
            if "category" in last.model_fields_set and category != self.category:
                raise BadRowError(
                    f"the row's category {self.category!r} and the last message's {category!r} "
                    "differ; one of them is enough"
                )
            category = self.category
        if any(turn.content is None for turn in self.messages[:-1]):
            raise BadRowError("messages: only the last message may have no content")
        *earlier, reply = (
            Message(role=turn.role, content=turn.content or "", category=turn.category)
            for turn in self.messages
        )
        return *earlier, reply.model_copy(update={"category": category})


def parse_row(values: Mapping[str, Any], origin: str, categories: Collection[str]) -> Row:
    """Checks a row of our own format.

    Args:
        values: `prompt`, `category` and `response`, or `messages` whose assistant turns carry a
            `category`; and, where they apply, `answer`, `pair`, `near_miss`. Others are not read.
    """
    kind = _ConversationRow if "messages" in values else _PromptRow
    try:
        row: _ConversationRow | _PromptRow = kind.model_validate(values)
    except ValidationError as error:
        raise BadRowError("; ".join(_reason(detail) for detail in error.errors())) from error
    turns = row.turns()
    _check_turns(turns, categories)
    if row.near_miss is not None:
        _check_category(row.near_miss, categories, "near_miss")
        if turns[-1].category is not None:
            raise BadRowError(
                f"near_miss marks prompts that are to be answered, and the category is "
                f"{turns[-1].category!r}"
            )
    return Row(turns, row.answer, row.pair, origin, row.near_miss)


def _reason(detail: ErrorDetails) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    hint = HINTS.get(str(detail["loc"][-1]), "")
    if detail["type"] == "missing":
        return f"{where}: is missing{hint}"
    if detail["type"] == "string_too_short":
        return f"{where}: is empty{hint}"
    if detail["type"] == "too_short":
        return f"{where}: must be a question and what follows, the assistant's turn last"
    if detail["type"] == "tuple_type":
        return f"{where}: must be a list of turns"
    if detail["type"] == "model_type":
        return f"{where}: must be an object with role and content"
    message = detail["msg"]
    return f"{where}: {message[0].lower()}{message[1:]}"


def _check_turns(turns: Sequence[Message], categories: Collection[str]) -> None:
    if turns[-1].role != "assistant":
        raise BadRowError("the last message must be the assistant's")
    for turn in turns:
        if turn.category is None:
            continue
        if turn.role != "assistant":
            raise BadRowError("only assistant messages have a category")
        _check_category(turn.category, categories, "category")


def _check_category(value: str, categories: Collection[str], field: str) -> None:
    if value in categories:
        return
    if field == "category" and not value.strip():
        raise BadRowError(
            "category is empty; if that means that the response answers, say so in the recipe: "
            'categories: {"": null}'
        )
    known = ", ".join(categories)
    answers = ", and null where the response answers" if field == "category" else ""
    raise BadRowError(f"{field} {value!r} is unknown; known are {known}{answers}")


class Refused(NamedTuple):
    """A record that is no row."""

    record: Record
    reason: str


def complaint(refused: Iterable[Refused]) -> str:
    """Returns one line for each reason: the first place in full, and where else it holds."""
    by_reason: dict[tuple[str, str], list[Record]] = {}
    for record, reason in refused:
        by_reason.setdefault((record.file, reason), []).append(record)
    lines = [_line(reason, records) for (_, reason), records in by_reason.items()]
    hidden = len(lines) - MAX_REASONS
    if hidden > 0:
        lines[MAX_REASONS:] = [f"and {hidden} more rows or groups of rows are wrong"]
    return "\n".join(lines)


def _line(reason: str, records: Sequence[Record]) -> str:
    first, *others = records
    if not others:
        return f"{first.origin}: {reason}"
    return f"{first.origin}: {reason} (also {first.unit}s {_places(others)})"


def _places(records: Sequence[Record]) -> str:
    shown = ", ".join(str(record.number) for record in records[:MAX_PLACES])
    hidden = len(records) - MAX_PLACES
    return shown if hidden <= 0 else f"{shown} and {hidden} more"


def checked(
    records: Iterable[Record], categories: Collection[str], refused: list[Refused]
) -> Iterator[Row]:
    """Yields the rows that can be used; the others go into `refused`."""
    for record in records:
        try:
            if isinstance(record.values, BadRowError):
                raise record.values
            yield parse_row(record.values, record.origin, categories)
        except BadRowError as error:
            refused.append(Refused(record, str(error)))
