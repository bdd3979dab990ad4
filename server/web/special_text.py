"""Finds the special tokens of a tokenizer in strings, and breaks them with a mark."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from models.errors import RequestError

Spans = Callable[[str], list[tuple[int, int]]]

_MOST_ROUNDS = 4
_WORDS = re.compile(r"[\w .:-]+")


class Protected(NamedTuple):
    """A special token of the served tokenizer.

    Attributes:
        text: What spells it.
        normalised: Whether the tokenizer looks for it in normalised text, where other characters
            may spell it too.
    """

    text: str
    normalised: bool = False


class SpecialText:
    """Finds and breaks special tokens in strings.

    Args:
        tokens: What must not be spelt. They are found as the tokenizer finds them, by their text;
            where one is looked for in normalised text, every string is encoded.
        mark: The text of the mark.
        spans: Gives the places, start and end, where the tokenizer finds one of them in a string.
    """

    def __init__(self, tokens: Sequence[Protected], mark: str, spans: Spans) -> None:
        texts = sorted((token.text for token in tokens), key=len, reverse=True)
        self.mark = mark
        self._spans = spans
        self._encodes_all = any(token.normalised for token in tokens)
        self._firsts = sorted({text[0] for text in texts})
        self._found = re.compile("|".join(map(re.escape, texts)))
        # A token of n characters may be shared by several strings that a template prints side by
        # side, with the space around them taken off. Then the first holds two of its characters
        # or more, or the last holds n - 1, or one between them lies wholly within the token.
        self._heads = frozenset(text[:end] for text in texts for end in range(2, len(text)))
        self._middles = frozenset(
            text[start:end].strip()
            for text in texts
            for start in range(1, len(text))
            for end in range(start + 1, len(text))
        ) - {""}
        self._longest_head = max(map(len, texts)) - 1
        self._tails = tuple(tail for text in texts if (tail := text[1:].strip()))
        # What a template that prints `<name>` or `</name>` makes a token of. Words are left out:
        # they are the names of real fields.
        self._framed = frozenset(
            text for text in self._middles if len(text) > 1 and not _WORDS.fullmatch(text)
        )

    def may_meet(self, texts: Sequence[str], names: Collection[str]) -> bool:
        """Returns whether any of a body's strings needs a closer look, alone or beside others.

        Args:
            texts: Those that a template may print.
            names: Those that it prints as names, if at all.
        """
        return (
            self.may_spell("\n".join((*texts, *names)))
            or any(map(self._continues, texts))
            or any(map(self._is_framed, names))
        )

    def may_break(self, text: str) -> bool:
        """Returns whether ``broken`` could change a string."""
        return self.may_spell(text) or self._continues(text)

    def completes(self, name: str) -> bool:
        """Returns whether a name spells a special token, or would with what stands around it.

        Names take no mark: templates and grammars look them up.
        """
        return self.spells(name) or self._is_framed(name) or self._ends_in_head(name)

    def spells(self, text: str) -> bool:
        """Returns whether the tokenizer would find a special token in a string."""
        if not self.may_spell(text):
            return False
        return bool(self._found.search(text)) or (self._encodes_all and bool(self._spans(text)))

    def broken(self, text: str) -> str:
        """Returns a string with a mark in every special token that it spells or could help spell.

        Raises:
            RequestError: The tokenizer finds one all the same.
        """
        text = self.unspelt(text)
        if self._continues(text):
            start = len(text) - len(text.lstrip())
            text = text[:start] + self.mark + text[start:]
        if self._ends_in_head(text):
            end = len(text.rstrip())
            text = text[:end] + self.mark + text[end:]
        return text

    def unspelt(self, text: str) -> str:
        """Returns a string with a mark in every special token that it spells by itself.

        Raises:
            RequestError: The tokenizer finds one all the same.
        """
        if not self.spells(text):
            return text
        text = self._without_texts(text)
        return self._without_spans(text) if self._encodes_all else text

    def may_spell(self, text: str) -> bool:
        """Returns whether a string needs a closer look."""
        return self._encodes_all or any(map(text.__contains__, self._firsts))

    def _split(self, match: "re.Match[str]") -> str:
        return match[0][0] + self.mark + match[0][1:]

    def _without_texts(self, text: str) -> str:
        # A token that was broken may have hidden another one.
        for _ in range(_MOST_ROUNDS):
            text, found = self._found.subn(self._split, text)
            if not found:
                return text
        raise _unbreakable()

    def _without_spans(self, text: str) -> str:
        for _ in range(_MOST_ROUNDS):
            spans = self._spans(text)
            if not spans:
                return text
            for start, end in reversed(spans):
                place = min(start + 1, end)
                text = text[:place] + self.mark + text[place:]
        raise _unbreakable()

    def _continues(self, text: str) -> bool:
        text = text.strip()
        return text in self._middles or text.startswith(self._tails)

    def _is_framed(self, name: str) -> bool:
        name = name.strip()
        return name in self._framed or name.startswith(self._tails)

    def _ends_in_head(self, text: str) -> bool:
        end = text.rstrip()[-self._longest_head :]
        return self.may_spell(end) and any(end[i:] in self._heads for i in range(len(end) - 1))


def _unbreakable() -> RequestError:
    return RequestError(
        "the input holds text that this model's tokenizer reads as a special token however it is "
        "broken: remove it",
        status=400,
    )
