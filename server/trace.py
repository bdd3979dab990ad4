"""The decision trace: one line of JSON a choice, and nothing of what anybody wrote."""

import asyncio
import json
import logging
import math
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from models.controls import Controls
from models.errors import ConfigError
from models.solver import Target
from server import metrics
from server.context import Steering
from server.protocol import RefusalOptions

FLUSH_S = 1.0
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
        steering: Its effective dials and its decisions.
    """

    received: datetime
    tenant: str | None
    route: str
    asked: RefusalOptions
    steering: Steering


class DecisionTrace:
    """Collects decisions and writes them from a thread. It never fails a request.

    Args:
        path: A file that is appended to, or ``-``.
        names: The categories in manifest order.

    Raises:
        ConfigError: The file cannot be written to.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path = path
        self._names = tuple(names)
        self._waiting: list[Traced] = []
        try:
            self._append("")
        except OSError as error:
            raise ConfigError(
                f"RHEOSTAT_TRACE_FILE: {path} cannot be written: {error.strerror}"
            ) from error

    def add(self, traced: Traced) -> None:
        """Takes a request; it is written within the second."""
        if not traced.steering.decisions:
            return
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(traced)
        else:
            metrics.TRACE_LOST.inc(len(traced.steering.decisions))

    @asynccontextmanager
    async def writing(self, every_s: float = FLUSH_S) -> AsyncIterator[None]:
        """Writes every second what waits, and at the end what is left."""
        ended = asyncio.Event()
        task = asyncio.create_task(self._write_until(ended, every_s))
        try:
            yield
        finally:
            ended.set()
            await task

    async def _write_until(self, ended: asyncio.Event, every_s: float) -> None:
        last = False
        while not last:
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), every_s)
            last = ended.is_set()
            if self._waiting:
                waiting, self._waiting = self._waiting, []
                await asyncio.to_thread(self._write, waiting)

    def _write(self, waiting: Sequence[Traced]) -> None:
        lines = [
            json.dumps(line) for traced in waiting for line in trace_lines(traced, self._names)
        ]
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


def trace_lines(traced: Traced, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Returns what is written of a request, one object a choice.

    Args:
        traced: The request.
        names: The categories in manifest order.
    """
    steering = traced.steering
    asked = asked_dials(traced.asked)
    effective = _effective(steering.controls, names)
    for (call, choice), decision in sorted(steering.decisions.items()):
        index = decision.category if steering.enforce else decision.shadow
        refusal = "refuse" if steering.enforce else "would_refuse"
        category = None if index is None else names[index]
        yield {
            "time": traced.received.isoformat(timespec="milliseconds"),
            "request_id": steering.request_ids[call] if call < len(steering.request_ids) else None,
            "choice": choice,
            "route": traced.route,
            "tenant": traced.tenant,
            "policy": steering.policy,
            "enforce": steering.enforce,
            "asked": asked,
            "effective": effective,
            "clamped": dict(steering.dials.clamped),
            "decision": "respond" if category is None else refusal,
            "category": category,
        }


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
