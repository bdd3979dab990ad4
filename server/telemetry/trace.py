"""The decision trace: a line of JSON a choice, a scoring and a kind of denial, without any text."""

import asyncio
import json
import logging
import math
import sys
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import count
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
# Denials are counted for so many flushes.
FLUSHES_A_COUNT = 10
# Requests that wait for the disk; what comes on top is counted as lost instead of kept.
MOST_WAITING = 65_536
STANDARD_OUTPUT = Path("-")

_log = logging.getLogger(__name__)


class Traced(NamedTuple):
    """One request, when all of its choices are decided.

    Attributes:
        received: When it came in, in UTC.
        tenant: Who sent it; none for callers who are no tenant.
        route: Where it was sent to.
        asked: Its own dials.
        context: Its effective dials and its decisions.
    """

    received: datetime
    tenant: str | None
    route: str
    asked: RefusalOptions
    context: DecisionContext

    def lines(self, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yields what is written of the request, one object a choice.

        Args:
            names: The categories in manifest order.
        """
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
        received: When it came in, in UTC.
        tenant: Who sent it; none for callers who are no tenant.
        route: Where it was sent to.
        policy: Name of the policy that it follows.
        asked: Its own dials.
        dials: Its effective dials.
        inputs: How many prompts it held.
        refused: How many of them would be refused.
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
    """Collects decisions and writes them from a thread. It never fails a request.

    Args:
        path: A file that is appended to, or ``-``.
        names: The categories in manifest order.
        fields: Names of request fields; the path of a denial holds no other words.

    Attributes:
        denials: What was denied since the last writing.

    Raises:
        ConfigError: The file cannot be written to.
    """

    def __init__(self, path: Path, names: Sequence[str], fields: Iterable[str] = ()) -> None:
        self._path = path
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
        """Takes a request; it is written within the second."""
        lines = len(entry.context.decisions) if isinstance(entry, Traced) else 1
        if not lines:
            return
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(entry)
        else:
            metrics.TRACE_LOST.inc(lines)

    @asynccontextmanager
    async def writing(self, every_s: float = FLUSH_S) -> AsyncIterator[None]:
        """Writes every second what waits, and at the end what is left."""
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
        except (OSError, ValueError) as error:  # the latter from a closed standard output
            metrics.TRACE_LOST.inc(len(lines))
            _log.warning("%d lines of %s are lost: %s", len(lines), self._path, error)

    def _append(self, text: str) -> None:
        if self._path == STANDARD_OUTPUT:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        # Opened each time, so that the file can be rotated away.
        with self._path.open("a", encoding="utf-8") as file:
            file.write(text)


def asked_dials(options: RefusalOptions) -> dict[str, Any]:
    """Returns a request's ``refusal`` object as JSON, every dial spelt out."""
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
