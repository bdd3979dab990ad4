"""A guard for tests without a tokenizer: for the control tokens and two turn markers."""

from server.web.guard import Guard
from server.web.special_text import Protected, SpecialText
from tests.server.manifests import MANIFEST

MARK = "mark0"
TURNS = ("<|user|>", "<|end|>")


def no_spans(text: str) -> list[tuple[int, int]]:
    """Stands for a tokenizer that finds every token by its text, and so none that is broken."""
    return []


def special_text(*texts: str) -> SpecialText:
    return SpecialText([Protected(text) for text in texts], MARK, no_spans)


CONTROL = [control.token for control in MANIFEST.control_tokens]
GUARD = Guard(
    special_text(*CONTROL, *TURNS), special_text(*CONTROL), categories=frozenset(MANIFEST.names)
)
