"""Special tokens that a client types reach the model as text.

vLLM renders a conversation to one string and encodes it with special tokens on, so text that
spells a control token or a turn marker would become one. Here a mark is put into every such place.
The mark is a token of the server's own tokenizer: it splits what would have been found as one, and
server/generation/prompts.py takes its id out before the engine sees the prompt. What is left is
the client's text, byte for byte, in ordinary tokens.
"""

import json
import math
import re
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple

from models.errors import RequestError
from models.manifest import Manifest
from server.web.limits import prompts_in
from server.web.places import (
    ARGUMENTS,
    CONTAINERS,
    CONVERSATIONS,
    PROTOCOL,
    RAW,
    ROLES,
    STRUCTURE,
    TEXTS,
    UNRENDERED,
    WORDS,
    Place,
    place_in,
    place_of,
)
from server.web.special_text import Protected, Spans, SpecialText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HOLDS_TEXT = (str, list, dict)


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
        categories: The names that ``refusal_category`` may hold.
    """

    def __init__(
        self,
        special: SpecialText,
        control: SpecialText,
        roles: frozenset[str] = ROLES,
        characters: float = math.inf,
        categories: frozenset[str] = frozenset(),
    ) -> None:
        self._special = special
        self._control = control
        self._roles = roles
        self._words = WORDS | roles | categories
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
                token; special tokens are refused; a tool call's arguments cannot be decoded; or
                there is more text than its prompts may have.
        """
        for name in CONVERSATIONS:
            if isinstance(body.get(name), list):
                self._check_roles(body[name], name)
        texts, names = _strings(body, self._words)
        if cut := _cut_by(body):
            self._room(body).take("".join(texts), cut)
        if not self._special.may_meet(texts, names):
            return body
        room = self._room(body)
        try:
            changed = {
                name: value if name in UNRENDERED else self._field(name, value, refuse, room)
                for name, value in body.items()
            }
        except RecursionError as error:
            raise RequestError("the body nests too deeply", status=400) from error
        return body if all(changed[name] is body[name] for name in body) else changed

    def _room(self, body: dict[str, Any]) -> _Room:
        return _Room(self._characters * prompts_in(body))

    def _field(self, name: str, value: Any, refuse: bool, room: _Room) -> Any:
        special = self._control if name in RAW else self._special
        if isinstance(value, int | float | None):
            return value
        walk = _Walk(special, refuse, room, self._words)
        if isinstance(value, str) and name not in TEXTS and not refuse:
            return special.unspelt(value) if walk.looks_closer(value, name) else value
        return walk.walked(value, name, place_of(name))

    def _check_roles(self, messages: list[Any], path: str) -> None:
        for place, message in enumerate(messages):
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


def _cut_by(body: dict[str, Any]) -> str | None:
    # Then vLLM encodes all of the text, and cuts the ids; else it counts characters first.
    if body.get("truncate_prompt_tokens") is not None and body.get("truncation_side") is None:
        return "truncate_prompt_tokens"
    return "truncation" if body.get("truncation", "disabled") != "disabled" else None


def _strings(body: dict[str, Any], words: frozenset[str]) -> tuple[list[str], set[str]]:
    texts: list[str] = []
    names: set[str] = set()
    protocol: list[Any] = []
    others: list[Any] = []
    for name, value in body.items():
        if name in UNRENDERED:
            continue
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, _HOLDS_TEXT):
            (protocol if name in PROTOCOL else others).append(value)
    for nodes, exempt in ((protocol, words), (others, frozenset[str]())):
        for node in nodes:  # which grow on the way
            if isinstance(node, list):
                nodes.extend(node)
            elif isinstance(node, dict):
                names.update(node)
                _sort(node, exempt, texts, nodes, others)
            elif isinstance(node, str):
                texts.append(node)
    return texts, names


def _sort(
    node: dict[str, Any],
    words: frozenset[str],
    texts: list[str],
    contained: list[Any],
    others: list[Any],
) -> None:
    for key, entry in node.items():
        if isinstance(entry, str):
            if key == ARGUMENTS:
                others.append(_decoded(entry))
            elif key not in STRUCTURE or entry not in words:
                texts.append(entry)
        elif isinstance(entry, list | dict):
            (contained if key in CONTAINERS else others).append(entry)


def _decoded(arguments: str) -> Any:
    """Returns what vLLM makes of a tool call's arguments; the same text where that is no JSON.

    Raises:
        RequestError: vLLM would fail at it.
    """
    try:
        value = json.loads(arguments)
        if "\\u" in arguments:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError:
        return arguments
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "the arguments of a tool call nest too deeply, or hold a number that is too long or "
            "half of a surrogate pair",
            status=400,
        ) from error
    return value if isinstance(value, list | dict) else arguments


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
    words: frozenset[str]

    def looks_closer(self, text: str, path: _Path) -> bool:
        if not self.special.may_spell(text):
            return False
        self.room.take(text, path)
        return True

    def walked(self, value: Any, path: _Path, place: Place) -> Any:
        if isinstance(value, str):
            return self._string(value, path, place) if self.special.may_break(value) else value
        if isinstance(value, list):
            return self._list(value, path, place)
        if isinstance(value, dict):
            return self._mapping(value, path, place)
        return value

    def _list(self, value: list[Any], path: _Path, place: Place) -> list[Any]:
        changed = value
        for index, entry in enumerate(value):
            if not isinstance(entry, _HOLDS_TEXT):
                continue
            new = self.walked(entry, (path, index), place)
            if new is not entry:
                changed = list(value) if changed is value else changed
                changed[index] = new
        return changed

    def _mapping(self, value: dict[str, Any], path: _Path, place: Place) -> dict[str, Any]:
        changed = value
        for key, entry in value.items():
            self.looks_closer(key, path)
            if self.special.completes(key):
                raise _spelt(path, "a key")
            new = self._entry(key, entry, (path, key), place)
            if new is not entry:
                changed = dict(value) if changed is value else changed
                changed[key] = new
        return changed

    def _entry(self, key: str, entry: Any, path: _Path, place: Place) -> Any:
        if isinstance(entry, str):
            if place == "protocol" and key in STRUCTURE and entry in self.words:
                return entry
            if place != "schema" and key == ARGUMENTS:
                return self._arguments(entry, path)
        return self.walked(entry, path, place_in(place, key, entry))

    def _arguments(self, text: str, path: _Path) -> str:
        value = _decoded(text)
        new = self.walked(value, path, "text")
        if new is value:
            return text
        return new if isinstance(new, str) else json.dumps(new, ensure_ascii=False)

    def _string(self, text: str, path: _Path, place: Place) -> str:
        closer = self.looks_closer(text, path)
        if place == "schema":
            if self.special.completes(text):
                raise _spelt(path, "a tool's name or schema")
            return text
        if closer and self.refuse and self.special.spells(text):
            raise _spelt(path, "the text")
        return self.special.broken(text)


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
    return Guard(text(special), text(control), roles, characters, frozenset(manifest.names))


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
