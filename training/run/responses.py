"""Responses for rows that have none: the base model's own answers, and texts of refusals."""

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models.files import parse_yaml
from training.config.recipe import DEFAULT_REFUSAL_TEXT, CheckpointModel
from training.data.rows import Row
from training.model.gguf import model_folder
from training.model.output_rows import on_device
from training.model.start import load_model, tokenizer_of

ROWS_AT_ONCE = 32
HARMFUL = "safety"


class Wanted(NamedTuple):
    """What is written.

    Attributes:
        base: The model whose answers are wanted.
        dtype: What it computes in.
        max_length: Of a row in tokens; an answer that is not finished by then is cut there by a
            training of the same length, so that no early end is learnt.
        pairs: Share of the rows that become counterfactual pairs: an answered prompt is also
            refused, for a category drawn at random, and a refused one also answered. A row of
            its own teaches the prompt's decision, which a pair does not.
        seed: Of every draw.
        temperature: Of the answers. 0: the most likely one. 1: drawn from the model's own
            distribution, which a training on them does not sharpen.
    """

    base: CheckpointModel
    dtype: str
    max_length: int
    pairs: float
    seed: int
    temperature: float = 0.0


def write_responses(rows: Sequence[Row], wanted: Wanted, out: Path) -> int:
    """Appends rows with responses to a file; a row that the file has already is not made again.

    Prompts refused for `safety` get no answer, whatever `pairs` says.

    Returns:
        How many rows the file then has.
    """
    known = _known(out)
    todo = [row for row in _single(rows) if row.prompt[-1].content not in known]
    answer = _Answers(wanted)
    names = sorted({row.category for row in todo if row.category is not None})
    with out.open("a", encoding="utf-8") as file, _progress(len(todo)) as advance:
        for start in range(0, len(todo), ROWS_AT_ONCE):
            chunk = todo[start : start + ROWS_AT_ONCE]
            made = list(_responses(chunk, wanted, names, answer))
            # At once: a run that is killed while the model answers leaves no half of a pair.
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
            file.flush()
            advance(len(chunk))
    return sum(1 for _ in out.open(encoding="utf-8"))


def _known(out: Path) -> set[str]:
    if not out.exists():
        return set()
    return {json.loads(line)["prompt"] for line in out.open(encoding="utf-8")}


def _single(rows: Sequence[Row]) -> Iterator[Row]:
    """Yields rows of one turn, alike in length, so that batches hold little padding."""
    single = [row for row in rows if len(row.prompt) == 1 and row.pair is None]
    yield from sorted(single, key=lambda row: len(row.prompt[0].content))


def _responses(
    chunk: Sequence[Row],
    wanted: Wanted,
    names: Sequence[str],
    answer: Callable[[Sequence[str]], list[str]],
) -> Iterator[Mapping[str, Any]]:
    texts = _refusal_texts()
    draws = [random.Random(f"{wanted.seed}/{row.prompt[0].content}") for row in chunk]
    drawn = [
        rng.random() < wanted.pairs and row.category != HARMFUL
        for row, rng in zip(chunk, draws, strict=True)
    ]
    prompts = [
        row.prompt[0].content
        for row, pair in zip(chunk, drawn, strict=True)
        if row.category is None or pair
    ]
    answers = dict(zip(prompts, answer(prompts), strict=True))
    for row, rng, pair in zip(chunk, draws, drawn, strict=True):
        text = answers.get(row.prompt[0].content)
        paired = pair and bool(text)  # a model may say nothing
        if row.category is not None or paired:
            category = row.category or rng.choice(list(names) or list(texts))
            told = row.response if row.category else None
            told = told or rng.choice(texts.get(category, [DEFAULT_REFUSAL_TEXT]))
            yield _row(row, category, told, paired=paired)
        if text and (row.category is None or paired):
            yield _row(row, None, text, paired=paired)
        if paired:
            yield _row(row, row.category, None, paired=False)


def _row(
    row: Row, category: str | None, response: str | None, *, paired: bool
) -> Mapping[str, Any]:
    prompt = row.prompt[0].content
    values: dict[str, Any] = {"prompt": prompt, "category": category, "response": response}
    if paired:
        return {**values, "pair": prompt}
    return values if row.near_miss is None else {**values, "near_miss": row.near_miss}


def _refusal_texts() -> Mapping[str, list[str]]:
    source = Path(__file__).parents[1] / "data" / "refusal_texts.yaml"
    texts: Mapping[str, list[str]] = parse_yaml(source.read_text(encoding="utf-8"), str(source))
    return texts


class _Answers:
    """A model's answers to prompts of one turn."""

    def __init__(self, wanted: Wanted) -> None:
        folder = model_folder(wanted.base)
        self._tokenizer: Any = tokenizer_of(wanted.base, folder)
        self._model = on_device(load_model(folder, wanted.dtype))
        self._wanted = wanted

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        import torch

        if not prompts:
            return []
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = self._tokenizer.apply_chat_template(
            chats, tokenize=False, add_generation_prompt=True
        )
        batch = self._tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self._model.device)
        # One token more than fits into a row: what is not finished is cut when it is learnt.
        shortest = int(batch["attention_mask"].sum(1).min())
        sampling: dict[str, Any] = {"do_sample": False}
        if self._wanted.temperature > 0:
            # The base's own filters, which its generation config may have, would sharpen as well.
            sampling = {"do_sample": True, "temperature": self._wanted.temperature}
            sampling |= {"top_k": 0, "top_p": 1.0}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(random.Random(f"{self._wanted.seed}/{prompts}").randrange(2**32))
            ids = self._model.generate(
                **batch,
                **sampling,
                max_new_tokens=max(1, self._wanted.max_length - shortest + 1),
                pad_token_id=self._tokenizer.eos_token_id,
            )
        new = ids[:, batch["input_ids"].shape[1] :]
        return [
            text.strip() for text in self._tokenizer.batch_decode(new, skip_special_tokens=True)
        ]


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("writing responses", total=rows)
        yield lambda done: bar.advance(task, done)
