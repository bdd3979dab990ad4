"""What a reader of texts gets, and what it says."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

Outcome = Literal["answered", "refused", "undecided"]
OUTCOMES: tuple[Outcome, ...] = ("answered", "refused", "undecided")


class Exchange(NamedTuple):
    """A question and the text that came back."""

    question: str
    text: str


class Reader(Protocol):
    """Says what texts do.

    Attributes:
        name: Stands in reports.
    """

    name: str

    async def read(self, exchanges: Sequence[Exchange]) -> list[Outcome]:
        """Returns each text's outcome, in order."""
