"""Special tokens that a client types reach the model as text.

vLLM renders a conversation to one string and encodes it with special tokens on, so text that
spells a control token or a turn marker would become one. Here a mark is put into every such place.
The mark is a token of the server's own tokenizer: it splits what would have been found as one, and
server/prompts.py takes its id out before the engine sees the prompt. What is left is the client's
text, byte for byte, in ordinary tokens.
"""

import math
import re
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from models.errors import RequestError
from models.manifest import Manifest
from server.history import CATEGORY_FIELD
from server.limits import prompts_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = Callable[[str], list[tuple[int, int]]]

# Of a body's fields those that no chat template prints. Every other one is guarded.
UNRENDERED = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "cache_salt",
        "logit_bias",
        "model",
        "prompt_cache_key",
        "request_id",
        "response_format",
        "safety_identifier",
        "stop",
        "stop_sequences",
        "structured_outputs",
        "text",
        "tool_choice",
        "user",
    }
)
# The top-level strings that are text; others are flags and names.
TEXTS = frozenset({"system", "instructions", "input", "prompt", "suffix"})
# Their writer makes the turns, so only control tokens are broken in them.
RAW = frozenset({"prompt", "suffix"})
CONVERSATIONS = ("messages", "input")
# A grammar may be made of tools: a mark in one would come back in the answer. Prose is safe.
TOOLS = frozenset({"tools", "functions"})
PROSE = frozenset({"description", "title", "$comment"})
# Words of the protocol, which routes compare and no template prints unchecked.
STRUCTURE = frozenset({"role", "type", "status", CATEGORY_FIELD})
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_HOLDS_TEXT = (str, list, dict)
_MOST_ROUNDS = 4


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
        # side. Then the first holds two of its characters or more, or the last holds n - 1, or
        # one between them lies wholly within the token.
        self._heads = frozenset(text[:end] for text in texts for end in range(2, len(text)))
        self._middles = frozenset(
            text[start:end]
            for text in texts
            for start in range(1, len(text))
            for end in range(start + 1, len(text))
        )
        self._longest_head = max(map(len, texts)) - 1
        self._tails = tuple(text[1:] for text in texts if len(text) > 1)

    def may_meet(self, texts: Sequence[str], keys: Sequence[str]) -> bool:
        """Returns whether any of a body's strings needs a closer look, alone or beside others.

        Args:
            texts: Those that a template may print.
            keys: Those that it prints as names, if at all.
        """
        return (
            self.may_spell("\n".join((*texts, *keys)))
            or not self._middles.isdisjoint(texts)
            or any(text.startswith(self._tails) for text in texts)
        )

    def may_break(self, text: str) -> bool:
        """Returns whether ``broken`` could change a string."""
        return self.may_spell(text) or text in self._middles or text.startswith(self._tails)

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
        if text in self._middles or text.startswith(self._tails):
            text = self.mark + text
        return text + self.mark if self._ends_in_head(text) else text

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

    def _ends_in_head(self, text: str) -> bool:
        end = text[-self._longest_head :]
        return self.may_spell(end) and any(end[i:] in self._heads for i in range(len(end) - 1))


class _Room:
    """How much text a request may still bring that needs a closer look.

    More than the contexts of its prompts hold would be refused after the rendering, when its cost
    is paid.
    """

    def __init__(self, characters: float) -> None:
        self._most = self._left = characters

    def take(self, text: str, path: "_Path") -> None:
        self._left -= len(text)
        if self._left < 0:
            raise RequestError(
                f"{_dotted(path)}: the request is longer than this model's context: its prompts "
                f"may have at most {self._most} characters",
                param=_dotted(path),
                status=400,
            )


class Guard:
    """Keeps a request's text from being read as special tokens.

    Args:
        special: Breaks every special token: for what a chat template prints.
        control: Breaks control tokens alone: for raw prompts.
        roles: The roles that a message may have.
        characters: The most that the model's context can hold.
    """

    def __init__(
        self,
        special: SpecialText,
        control: SpecialText,
        roles: frozenset[str] = ROLES,
        characters: float = math.inf,
    ) -> None:
        self._special = special
        self._control = control
        self._roles = roles
        self._characters = characters

    @property
    def mark(self) -> str:
        """The text of the mark, which stands in answers that repeat what was guarded."""
        return self._special.mark

    def guarded(self, body: dict[str, Any], *, refuse: bool = False) -> dict[str, Any]:
        """Returns a body whose text stays text; the same object where nothing had to be done.

        Args:
            body: The client's JSON object; not changed.
            refuse: Whether special tokens are refused rather than broken.

        Raises:
            RequestError: A role is none; a key, or a tool's name or schema, spells a special
                token; special tokens are refused; or there is more text than its prompts may have.
        """
        for name in CONVERSATIONS:
            self._check_roles(body.get(name), name)
        if not self._special.may_meet(*_strings(body)):
            return body
        room = _Room(self._characters * prompts_in(body))
        try:
            changed = {
                name: value if name in UNRENDERED else self._field(name, value, refuse, room)
                for name, value in body.items()
            }
        except RecursionError as error:
            raise RequestError("the body nests too deeply", status=400) from error
        return body if all(changed[name] is body[name] for name in body) else changed

    def _field(self, name: str, value: Any, refuse: bool, room: _Room) -> Any:
        special = self._control if name in RAW else self._special
        if isinstance(value, int | float | None):
            return value
        walk = _Walk(special, refuse, room)
        if isinstance(value, str) and name not in TEXTS and not refuse:
            return special.unspelt(value) if walk.looks_closer(value, name) else value
        return walk.walked(value, name, schema=name in TOOLS)

    def _check_roles(self, messages: Any, path: str) -> None:
        for place, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, list):
                self._check_roles(message, f"{path}.{place}")
                continue
            role = message.get("role") if isinstance(message, dict) else None
            if isinstance(role, str) and role not in self._roles:
                known = ", ".join(sorted(self._roles))
                raise RequestError(
                    f"{path}.{place}.role: this model knows no such role; it knows {known}",
                    param=f"{path}.{place}.role",
                    status=400,
                )


def _strings(body: dict[str, Any]) -> tuple[list[str], list[str]]:
    texts: list[str] = []
    keys: list[str] = []
    nodes = [value for name, value in body.items() if name not in UNRENDERED]
    for node in nodes:  # which grow on the way
        if isinstance(node, str):
            texts.append(node)
        elif isinstance(node, list):
            nodes.extend(node)
        elif isinstance(node, dict):
            keys.extend(node)
            nodes.extend(
                value
                for key, value in node.items()
                if not (key in STRUCTURE and isinstance(value, str))
            )
    return texts, keys


# Of what stands around a value, and its key or place in that; only an error makes a text of it.
_Path = str | tuple["_Path", str | int]


def _dotted(path: _Path) -> str:
    parts: list[str] = []
    while isinstance(path, tuple):
        path, last = path
        parts.append(str(last))
    return ".".join([path, *reversed(parts)])


class _Walk(NamedTuple):
    """A way through one field of a body. What needs no change is not copied."""

    special: SpecialText
    refuse: bool
    room: _Room

    def looks_closer(self, text: str, path: _Path) -> bool:
        if not self.special.may_spell(text):
            return False
        self.room.take(text, path)
        return True

    def walked(self, value: Any, path: _Path, *, schema: bool) -> Any:
        if isinstance(value, str):
            return self._string(value, path, schema) if self.special.may_break(value) else value
        if isinstance(value, list):
            return self._list(value, path, schema)
        if isinstance(value, dict):
            return self._mapping(value, path, schema)
        return value

    def _list(self, value: list[Any], path: _Path, schema: bool) -> list[Any]:
        changed = value
        for place, entry in enumerate(value):
            if not isinstance(entry, _HOLDS_TEXT):
                continue
            new = self.walked(entry, (path, place), schema=schema)
            if new is not entry:
                changed = list(value) if changed is value else changed
                changed[place] = new
        return changed

    def _mapping(self, value: dict[str, Any], path: _Path, schema: bool) -> dict[str, Any]:
        changed = value
        for key, entry in value.items():
            if key in STRUCTURE and isinstance(entry, str):
                continue
            if self.looks_closer(key, path) and self.special.spells(key):
                raise _spelt(path, "a key")
            prose = key in PROSE and isinstance(entry, str)
            new = self.walked(entry, (path, key), schema=schema and not prose)
            if new is not entry:
                changed = dict(value) if changed is value else changed
                changed[key] = new
        return changed

    def _string(self, text: str, path: _Path, schema: bool) -> str:
        closer = self.looks_closer(text, path)
        if closer and (schema or self.refuse) and self.special.spells(text):
            raise _spelt(path, "a tool's name or schema" if schema else "the text")
        return text if schema else self.special.broken(text)


def _unbreakable() -> RequestError:
    return RequestError(
        "the input holds text that this model's tokenizer reads as a special token however it is "
        "broken: remove it",
        status=400,
    )


def _spelt(path: _Path, what: str) -> RequestError:
    return RequestError(
        f"{_dotted(path)}: {what} spells a special token of this model: write it another way",
        param=_dotted(path),
        status=400,
    )


def build_guard(
    tokenizer: "PreTrainedTokenizerBase", manifest: Manifest, context: float = math.inf
) -> Guard:
    """Gives a tokenizer the mark, as one more token, and returns the guard that uses it.

    Control tokens become special, if they are not: adopted checkpoints hold them as ordinary ones,
    which a detokenizer would print. Their ids stay.

    Args:
        tokenizer: The one that prompts are encoded with; changed in place.
        manifest: The served checkpoint's.
        context: In tokens.
    """
    # As vLLM counts it.
    characters = context * max(map(len, tokenizer.get_vocab()))
    special = protected_tokens(tokenizer, manifest)
    control = {i: token for i, token in special.items() if i in manifest.control_ids}
    mark = new_mark()
    texts = [mark, *(token.token for token in manifest.control_tokens)]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": texts}, replace_extra_special_tokens=False
    )

    def text(tokens: dict[int, Protected]) -> SpecialText:
        return SpecialText(list(tokens.values()), mark, _spans_of(tokenizer, frozenset(tokens)))

    roles = ROLES | _quoted_roles(tokenizer)
    return Guard(text(special), text(control), roles, characters)


def new_mark() -> str:
    """Returns a mark: letters and digits, so that JSON does not escape it, that none can guess."""
    return f"mark{secrets.token_hex(8)}"


def protected_tokens(
    tokenizer: "PreTrainedTokenizerBase", manifest: Manifest
) -> dict[int, Protected]:
    """Returns the special tokens of a tokenizer and the control tokens, by id."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    normalises = backend is None or backend.normalizer is not None
    tokens = {token.id: Protected(token.token, normalises) for token in manifest.control_tokens}
    for token_id, added in tokenizer.added_tokens_decoder.items():
        if added.special or token_id in tokens:
            tokens[token_id] = Protected(added.content, added.normalized and normalises)
    return tokens


def _spans_of(tokenizer: "PreTrainedTokenizerBase", ids: frozenset[int]) -> Spans:
    def spans(text: str) -> list[tuple[int, int]]:
        encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        found = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [span for token, span in found if token in ids]

    return spans


def _quoted_roles(tokenizer: "PreTrainedTokenizerBase") -> frozenset[str]:
    # A template that treats a role of its own compares with its name.
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return frozenset(
        name
        for text in texts
        for name in re.findall(r"""role["']?\]?\s*==\s*["'](\w+)["']""", text)
    )
