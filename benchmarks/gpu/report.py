"""The GPU benchmark's tables, as Markdown."""

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.correctness import COUNTERS
from benchmarks.serving.report import table


def markdown(found: dict[str, Any]) -> str:
    """Returns the tables of all parts that were measured."""
    where = found["machine"]
    head = (
        f"{where['date']}, {where['gpu'] or where['processor']}, Python {where['python']}, "
        + ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    )
    writers = {
        "correctness": _correctness,
        "speed": lambda part: f"### Speed\n\n{part['tables']}",
        "large": lambda part: (
            f"### Speed with the shape of 8 billion parameters\n\n{part['tables']}"
        ),
        "kernel": _kernel,
        "loss": _loss,
    }
    parts = [writers[name](part) for name, part in found["parts"].items()]
    seconds = ", ".join(f"{name} {s:.0f} s" for name, s in found["seconds"].items())
    return "\n\n".join([head, *parts, f"Took {seconds}."]) + "\n"


def _correctness(part: dict[str, Any]) -> str:
    stock = part["unmodified engine"]
    agreement = ", ".join(
        f"{v['texts_equal_to_itself']} of {v['texts']} ({model})" for model, v in stock.items()
    )
    head = ["engine", "V2", "answered", "cancelled", "refused", "decisions equal", "of others near"]
    head += ["texts equal", "largest margin difference", "200 stop tokens are 422"]
    head += ["engine requests", "preemptions", "cached tokens", "accepted drafts"]
    rows = table(head, _scenario_rows(part))
    return (
        f"### Correctness\n\n{rows}\n\nTexts of the unmodified engine that were the same when it "
        f"was asked again: {agreement}."
    )


def _scenario_rows(part: dict[str, Any]) -> Iterator[list[str]]:
    for name, found in part.items():
        if name == "unmodified engine":
            continue
        if "failed" in found:
            yield [name, "failed: " + found["failed"].splitlines()[0], *[""] * 12]
            continue
        fields = ("v2", "answered", "cancelled", "refused", "decisions_equal", "near")
        values = [str(found[field]) for field in (*fields, "texts_equal")]
        counters = [f"{found[field]:.0f}" for field in COUNTERS]
        checks = [f"{found['largest_difference']:.2g}", str(found["bounds_kept"])]
        yield [name, *values, *checks, *counters]


def _kernel(part: dict[str, Any]) -> str:
    rows = (
        [
            f"V{step['runner']}",
            f"{step['deciding']} of {step['rows']}",
            "" if step["device_us"] is None else f"{step['device_us']:.1f}",
            f"{step['host_us']:.1f}",
        ]
        for step in part["steps"]
    )
    times = table(["runner", "deciding", "device, µs", "host, µs"], rows)
    profiled = (
        [f"{p['deciding']} of {p['rows']}", str(p["tensor_bytes"]), str(p["waits"])]
        for p in part["profile"]
    )
    profile = table(["deciding", "bytes allocated, 50 steps", "waits"], profiled)
    return (
        f"### The processor in a step\n\n{times}\n\n{profile}\n\nA step that may not wait for the "
        f"device, with margins: {part['waits']}."
    )


def _loss(part: dict[str, Any]) -> str:
    rows = (
        [
            f"{shape['tokens']} x {shape['vocab']}, hidden {shape['hidden']}, {shape['dtype']}",
            other,
            *(
                f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
                for r in (ratios["seconds"], ratios["peak_bytes"])
            ),
        ]
        for shape in part["results"]
        for other, ratios in shape["fused_to"].items()
    )
    head = ["shape", "fused flexible loss over", "time", "peak memory"]
    return f"### Loss\n\n{table(head, rows)}\n\nLiger: {part['liger']}."
