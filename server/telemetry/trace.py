"""The decision trace: JSON lines of choices, scores and denials, without any text."""

import asyncio
import json
import logging
import math
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from datetime import datetime
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from models.controls import Controls
from models.errors import ConfigError
from models.solver import Target
from server.background import repeated
from server.context import DecisionContext
from server.dials.board import Resolution
from server.dials.protocol import RefusalOptions
from server.telemetry import metrics
from server.telemetry.denials import Denials, Denied

FLUSH_S = 1.0
# Denials are counted over this many flushes.
FLUSHES_A_COUNT = 10
# Requests that wait for the disk; more are counted as lost.
MOST_WAITING = 65_536
STANDARD_OUTPUT = Path("-")

_log = logging.getLogger(__name__)


class Traced(NamedTuple):
    """One request, when all of its choices are decided.

    Attributes:
        received: In UTC.
        tenant: None for callers who are no tenant.
        asked: Its own dials.
        context: Its effective dials and its decisions.
    """

    received: datetime
    tenant: str | None
    route: str
    asked: RefusalOptions
    context: DecisionContext

    def lines(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields one object a choice."""
        context = self.context
        asked = asked_dials(self.asked)
        effective = _effective(context.controls, names)
        for (call, choice), decision in sorted(context.decisions.items()):
            index = decision.category if context.enforce else decision.shadow
            refusal = "refuse" if context.enforce else "would_refuse"
            category = None if index is None else names[index]
            known_id = call < len(context.request_ids)
            yield {
                "time": self.received.isoformat(timespec="milliseconds"),
                "request_id": context.request_ids[call] if known_id else None,
                "choice": choice,
                "route": self.route,
                "tenant": self.tenant,
                "policy": context.policy,
                "enforce": context.enforce,
                "asked": asked,
                "effective": effective,
                "clamped": dict(context.dials.clamped),
                "decision": "respond" if category is None else refusal,
                "category": category,
            }


class Scored(NamedTuple):
    """One request whose prompts were decided without an answer.

    Attributes:
        received: In UTC.
        tenant: None for callers who are no tenant.
        asked: Its own dials.
        dials: Its effective dials.
        inputs: Number of its prompts.
        refused: Number of prompts that would be refused.
    """

    received: datetime
    tenant: str | None
    route: str
    policy: str
    asked: RefusalOptions
    dials: Resolution
    inputs: int
    refused: int

    def lines(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields the request's one line."""
        yield {
            "time": self.received.isoformat(timespec="milliseconds"),
            "request_id": None,
            "route": self.route,
            "tenant": self.tenant,
            "policy": self.policy,
            "asked": asked_dials(self.asked),
            "effective": _effective(self.dials.controls, names),
            "clamped": dict(self.dials.clamped),
            "decision": "scored",
            "inputs": self.inputs,
            "refused": self.refused,
        }


class DecisionTrace:
    """Collects decisions and writes them in a thread. It never fails a request.

    Args:
        path: A file to append to, or ``-``.
        names: The categories in manifest order.
        fields: Names of request fields; the path of a denial has no other words.
        max_bytes: Size at which the file is renamed to ``.1``, which becomes ``.2``, and so on;
            0: never.
        files: How many renamed files are kept.
        lock: Held by the one process that writes, where several do.

    Attributes:
        denials: Since they were last written.

    Raises:
        ConfigError: The file cannot be written to.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        fields: Iterable[str] = (),
        *,
        max_bytes: int = 0,
        files: int = 5,
        lock: AbstractContextManager[object] | None = None,
    ) -> None:
        self._path = path
        self._lock = lock or nullcontext()
        self._max_bytes = max_bytes
        # The oldest first: each is renamed to the one before it.
        self._kept = [path.with_name(f"{path.name}.{n}") for n in range(files, 0, -1)]
        self._names = tuple(names)
        self._flushes = count(1)
        self._waiting: list[Traced | Scored | Denied] = []
        self.denials = Denials((*names, *fields))
        try:
            self._append("")
        except OSError as error:
            raise ConfigError(
                f"RHEOSTAT_TRACE_FILE: {path} cannot be written: {error.strerror}"
            ) from error

    def add(self, entry: Traced | Scored) -> None:
        """Adds a request, to be written within a second."""
        lines = len(entry.context.decisions) if isinstance(entry, Traced) else 1
        if not lines:
            return
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(entry)
        else:
            metrics.child(metrics.TRACE_LOST).inc(lines)

    @asynccontextmanager
    async def writing(self, every_s: float = FLUSH_S) -> AsyncIterator[None]:
        """Writes what waits every second, and at the end."""
        async with repeated(self._write_waiting, every_s, finishes=True):
            yield

    async def _write_waiting(self, last: bool) -> None:
        if last or next(self._flushes) % FLUSHES_A_COUNT == 0:
            self._waiting += self.denials.take()
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            await asyncio.to_thread(self._write, waiting)

    def _write(self, waiting: Sequence[Traced | Scored | Denied]) -> None:
        lines = [json.dumps(line) for entry in waiting for line in entry.lines(self._names)]
        try:
            self._append("".join(f"{line}\n" for line in lines))
        except (OSError, ValueError) as error:  # ValueError: the standard output is closed
            metrics.child(metrics.TRACE_LOST).inc(len(lines))
            _log.warning("%d lines of %s are lost: %s", len(lines), self._path, error)

    def _append(self, text: str) -> None:
        with self._lock:
            self._append_alone(text)

    def _append_alone(self, text: str) -> None:
        if self._path == STANDARD_OUTPUT:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        if self._max_bytes and self._is_full_with(text):
            self._rotate()
        # Opened each time, so that others can rotate the file too.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)

    def _is_full_with(self, text: str) -> bool:
        # Written as ASCII, so each character is a byte.
        size = self._path.stat().st_size if self._path.exists() else 0
        return bool(size) and size + len(text) > self._max_bytes

    def _rotate(self) -> None:
        for older, newer in pairwise([*self._kept, self._path]):
            if newer.exists():
                newer.replace(older)


def asked_dials(options: RefusalOptions) -> dict[str, Any]:
    """Returns a request's ``refusal`` object as JSON, with each dial as an object."""
    written = options.model_dump(exclude={"categories"}, exclude_none=True)
    if options.categories:
        written["categories"] = {n: _target(target) for n, target in options.categories.items()}
    return written


def _effective(controls: Controls, names: Sequence[str]) -> dict[str, Any]:
    biases = zip(names, controls.bias, strict=True)
    return {
        "decision": controls.rule.name.lower(),
        "bias": {name: _number_or_word(bias) for name, bias in biases},
    }


def _target(target: Target) -> dict[str, Any]:
    if target.bias is not None:
        return {"bias": _number_or_word(target.bias)}
    if target.rate is not None:
        return {"rate": target.rate}
    return {"false_refusal_rate": target.false_refusal_rate}


def _number_or_word(bias: float) -> float | str:
    return {math.inf: "always", -math.inf: "never"}.get(bias, bias)
