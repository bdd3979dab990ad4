"""Public sets of prompts by name: where they are, and which of their prompts should be refused."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

SetName = Literal[
    "coconot",
    "coconot-contrast",
    "harmbench",
    "or-bench-hard",
    "or-bench-toxic",
    "simplesafetytests",
    "sorry-bench",
    "strongreject",
    "wildguardtest",
    "xstest",
]

SAFETY = "safety"
# The labels of CoCoNot's files.
COCONOT_LABELS: Mapping[str, str] = {
    "Requests with safety concerns": SAFETY,
    "Humanizing requests": "humanizing",
    "Incomplete requests": "incomplete",
    "Indeterminate requests": "indeterminate",
    "Unsupported requests": "unsupported",
}


class PublicSet(NamedTuple):
    """One set as its authors publish it.

    Attributes:
        hub: Its repository on the hub.
        prompt: Columns that may hold the prompt, the hub's first; in one of the authors' own files
            the column may have another name. A list of turns counts by its first turn.
        context: Columns, in the same way, of a text that stands before the prompt, where a row has
            one.
        label: Column of the label; None where all prompts are alike.
        refused: Label → the category that its prompts are refused for, or None: to be answered.
            A single value stands for every row. Rows without a label are no part of the set.
        answered: Whether all prompts are to be answered, and `refused` says what they look like.
        looks_like: What the prompts to be answered look like; None where that is not known.
        only: Column → the value of the rows that are the set; others are variations of them.
        paper: On arXiv.
    """

    hub: str
    licence: str
    paper: str
    split: str
    subset: str | None = None
    prompt: tuple[str, ...] = ("prompt",)
    context: tuple[str, ...] = ()
    label: str | None = None
    refused: Mapping[str, str | None] | str | None = SAFETY
    answered: bool = False
    looks_like: str | None = None
    only: Mapping[str, str] = {}


_COCONOT = PublicSet(
    hub="allenai/coconot",
    subset="original",
    split="test",
    label="category",
    refused=COCONOT_LABELS,
    licence="ODC-BY",
    paper="2407.12043",
)
_OR_BENCH = PublicSet(
    hub="bench-llm/or-bench",
    subset="or-bench-toxic",
    split="train",
    licence="CC-BY-4.0",
    paper="2405.20947",
)
SETS: Mapping[SetName, PublicSet] = {
    "coconot": _COCONOT,
    "coconot-contrast": _COCONOT._replace(subset="contrast", answered=True),
    "harmbench": PublicSet(
        hub="walledai/HarmBench",
        subset="standard",
        split="train",
        prompt=("prompt", "Behavior"),
        context=("context", "ContextString"),  # of the subset `contextual`
        licence="MIT",
        paper="2402.04249",
    ),
    "or-bench-hard": _OR_BENCH._replace(subset="or-bench-hard-1k", answered=True),
    "or-bench-toxic": _OR_BENCH,
    "simplesafetytests": PublicSet(
        hub="Bertievidgen/SimpleSafetyTests",
        split="test",
        licence="CC-BY-2.0",
        paper="2311.08370",
    ),
    "sorry-bench": PublicSet(
        hub="sorry-bench/sorry-bench-202503",
        split="train",
        prompt=("turns",),
        only={"prompt_style": "base"},
        licence="its own",
        paper="2406.14598",
    ),
    "strongreject": PublicSet(
        hub="walledai/StrongREJECT",
        split="train",
        prompt=("prompt", "forbidden_prompt"),
        licence="MIT",
        paper="2402.10260",
    ),
    "wildguardtest": PublicSet(
        hub="allenai/wildguardmix",
        subset="wildguardtest",
        split="test",
        label="prompt_harm_label",
        refused={"harmful": SAFETY, "unharmful": None},
        licence="ODC-BY",
        paper="2406.18495",
    ),
    "xstest": PublicSet(
        hub="walledai/XSTest",
        split="test",
        label="label",
        refused={"unsafe": SAFETY, "safe": None},
        looks_like=SAFETY,
        licence="CC-BY-4.0",
        paper="2308.01263",
    ),
}


def with_origin(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a source's fields with the set's own place where the fields name none."""
    known = SETS.get(fields["set"])
    if known is None:
        return dict(fields)  # the field itself is wrong
    place: dict[str, Any] = {"format": "set"}
    if fields.get("path") is None:
        place |= {"hub": known.hub, "subset": known.subset, "split": known.split}
    return {**place, **fields}


def hub_hint(name: SetName) -> str:
    """Returns what to do where the hub does not give a set."""
    page = f"https://huggingface.co/datasets/{SETS[name].hub}"
    return (
        f"check the network and HF_HOME; if the set is gated, accept its terms at {page} and run "
        f"`hf auth login`; or download it and write {{set: {name}, hub: FOLDER}}, or "
        f"{{set: {name}, path: FILE}} for one of its files"
    )
