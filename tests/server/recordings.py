"""Answers of a real vLLM 0.32, as its server sent them before any shaping."""

import json
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"


def recorded_answer(name: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_text())
    return answer


def recorded_events(name: str) -> list[dict[str, Any]]:
    """Returns the objects of a stream's events."""
    return events_of((RECORDED / f"{name}.sse").read_text())


def events_of(stream: str) -> list[dict[str, Any]]:
    lines = stream.splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
