"""What a reader of texts gets, and what it says."""

from typing import Literal, NamedTuple

Outcome = Literal["answered", "refused", "undecided"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "undecided")


class Exchange(NamedTuple):
    """A question and the text that came back."""

    question: str
    text: str
