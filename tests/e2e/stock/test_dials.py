"""What a dial does, and what it leaves alone."""

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from models.controls import bias_of_sensitivity
from models.manifest import Manifest
from tests.e2e.servers import Post, Server

Row = dict[str, Any]
CONCURRENCY = 64


async def ask(
    client: AsyncOpenAI, prompt: str, refusal: dict[str, Any], **options: Any
) -> ChatCompletion:
    """Sends one greedy chat request."""
    answer: ChatCompletion = await client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": prompt}],
        temperature=options.pop("temperature", 0),
        max_tokens=options.pop("max_tokens", 1),
        extra_body={"refusal": refusal, **options.pop("extra_body", {})},
        **options,
    )
    return answer


async def ask_all(
    client: AsyncOpenAI, requests: Sequence[tuple[str, dict[str, Any]]], **options: Any
) -> list[ChatCompletion]:
    """Sends many requests, a bounded number of them at once."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(prompt: str, refusal: dict[str, Any]) -> ChatCompletion:
        async with gate:
            return await ask(client, prompt, refusal, **options)

    async with client:
        return await asyncio.gather(*(one(prompt, refusal) for prompt, refusal in requests))


def refused_for(answer: ChatCompletion) -> str | None:
    """Returns the category that the first choice was refused for."""
    message = answer.choices[0].message
    assert (message.refusal is None) != (message.content is None)
    return (message.model_extra or {}).get("refusal_category")


def prompts_of(evaluation: list[Row], category: str | None, count: int) -> list[str]:
    prompts = [row["prompt"] for row in evaluation if row["category"] == category]
    return random.Random(0).sample(prompts, count)


def report_of(answer: ChatCompletion) -> dict[str, Any]:
    report: dict[str, Any] = (answer.choices[0].model_extra or {})["refusal_report"]
    return report


@pytest.mark.parametrize("count", [2, pytest.param(8, marks=pytest.mark.long)])
def test_sweep_is_monotone_and_moves_no_other_category(
    asynchronous: AsyncOpenAI, manifest: Manifest, evaluation: list[Row], count: int
) -> None:
    prompts = [p for name in [*manifest.names, None] for p in prompts_of(evaluation, name, count)]
    steps = [step / 10 for step in range(11)]
    cases = [(name, x, prompt) for name in manifest.names for x in steps for prompt in prompts]
    answers = asyncio.run(
        ask_all(
            asynchronous,
            [(prompt, {"report": True, "categories": {name: x}}) for name, x, prompt in cases],
        )
    )
    reports = {case: report_of(answer) for case, answer in zip(cases, answers, strict=True)}
    for name in manifest.names:
        for prompt in prompts:
            sweep = [reports[name, x, prompt] for x in steps]
            refused = [report["refused"] for report in sweep]
            assert refused == sorted(refused), "a rising dial turned a refusal into an answer"
            own = [report["category"] == name for report in sweep]
            assert own == sorted(own), "a rising dial gave a refusal to another category"
            assert not own[0], "0 refuses none of the category"
            assert own[-1], "1 refuses all for the category"
            for other in manifest.names:
                if other != name:
                    moved = {report["decisions"][other]["refused"] for report in sweep}
                    assert len(moved) == 1, "the dial moved another category's own rule"


def test_report_agrees_with_the_unreported_decision(
    asynchronous: AsyncOpenAI, manifest: Manifest, evaluation: list[Row]
) -> None:
    rng = random.Random(1)
    prompts = [p for name in [*manifest.names, None] for p in prompts_of(evaluation, name, 20)]
    dials = [{name: rng.random() for name in manifest.names} for _ in prompts]
    cases = [
        (prompt, {"categories": dial, "report": report})
        for prompt, dial in zip(prompts, dials, strict=True)
        for report in (True, False)
    ]
    answers = asyncio.run(ask_all(asynchronous, cases))
    for with_report, without in zip(answers[::2], answers[1::2], strict=True):
        assert refused_for(with_report) == refused_for(without)
        assert report_of(with_report)["category"] == refused_for(with_report)
        assert "refusal_report" not in (without.choices[0].model_extra or {})


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Any) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(checkpoint)


def test_only_the_first_step_differs_from_the_unmodified_engine(
    asynchronous: AsyncOpenAI,
    stock: Server,
    manifest: Manifest,
    evaluation: list[Row],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """100 prompts: the text under a forced token is stock's text after that token."""
    rng = random.Random(2)
    prompts = rng.sample([row["prompt"] for row in evaluation], 100)
    forced = [rng.choice([*manifest.names, None]) for _ in prompts]
    dials = [
        {name: "always" if name == force else "never" for name in manifest.names}
        for force in forced
    ]
    answers = asyncio.run(
        ask_all(
            asynchronous,
            [(p, {"categories": d}) for p, d in zip(prompts, dials, strict=True)],
            max_tokens=40,
            extra_body={"return_token_ids": True},
        )
    )
    token_ids = {c.name: c.id for c in manifest.categories} | {None: manifest.respond.id}
    rendered: Any = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        tokenize=False,
        add_generation_prompt=True,
    )
    after_token = {"model": "demo", "temperature": 0, "max_tokens": 40, "return_token_ids": True}
    posts = [
        Post(
            "/v1/completions",
            {
                **after_token,
                "prompt": [*tokenizer.encode(text, add_special_tokens=False), token_ids[force]],
            },
        )
        for text, force in zip(rendered, forced, strict=True)
    ]
    for force, answer, stocks in zip(forced, answers, stock.post_all(posts), strict=True):
        assert refused_for(answer) == force
        expected = stocks.json()["choices"][0]
        choice = answer.choices[0]
        assert (choice.model_extra or {})["token_ids"] == expected["token_ids"]
        assert (choice.message.content or choice.message.refusal) == expected["text"]
        assert choice.finish_reason == expected["finish_reason"]


def slow_reference(
    margins: dict[str, float], dials: dict[str, float], names: Sequence[str]
) -> str | None:
    """Decides one request in plain Python: the greedy rule, category by category."""
    best: tuple[float, str] | None = None
    for name in names:
        score = margins[name] + bias_of_sensitivity(dials.get(name, 0.5))
        if score >= 0 and (best is None or score > best[0]):
            best = (score, name)
    return best[1] if best else None


def test_256_requests_at_once_decide_as_each_does_alone(
    asynchronous: AsyncOpenAI, server: Server, manifest: Manifest, evaluation: list[Row]
) -> None:
    """Different dials, plain and streamed, a quarter of them cancelled in flight."""
    rng = random.Random(3)
    rows = rng.sample(evaluation, 256)
    dials = [
        {name: rng.choice([0.02, 0.2, 0.5, 0.8, 0.98]) for name in rng.sample(manifest.names, 3)}
        for _ in rows
    ]
    cancelled = {i for i in range(256) if i % 4 == 3}

    async def at_once() -> list[ChatCompletion | BaseException]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            tasks = [
                asyncio.create_task(
                    ask(
                        client,
                        row["prompt"],
                        {"categories": dial},
                        max_tokens=400 if i in cancelled else rng.choice([1, 8, 30]),
                        extra_body={"ignore_eos": i in cancelled},
                    )
                )
                for i, (row, dial) in enumerate(zip(rows, dials, strict=True))
            ]
            done, _ = await asyncio.wait(
                tasks[::4], return_when=asyncio.FIRST_COMPLETED, timeout=60
            )
            assert done
            for i in cancelled:
                tasks[i].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    crowd = asyncio.run(at_once())
    kept = [i for i in range(256) if i not in cancelled]
    assert sum(isinstance(crowd[i], asyncio.CancelledError) for i in cancelled) > 30

    async def alone() -> list[ChatCompletion]:
        async with asynchronous as client:
            return [
                await ask(client, rows[i]["prompt"], {"categories": dials[i], "report": True})
                for i in kept
            ]

    for i, single in zip(kept, asyncio.run(alone()), strict=True):
        together = crowd[i]
        assert isinstance(together, ChatCompletion), together
        decisions = report_of(single)["decisions"]
        margins = {name: decisions[name]["margin"] for name in manifest.names}
        assert refused_for(single) == slow_reference(margins, dials[i], manifest.names)
        assert refused_for(together) == refused_for(single)


def test_sample_follows_the_biased_probability(
    asynchronous: AsyncOpenAI, manifest: Manifest, evaluation: list[Row]
) -> None:
    """400 draws at a dial that makes the model undecided lie within 4 sigma of one half."""
    prompt = prompts_of(evaluation, "safety", 1)[0]
    never = dict.fromkeys(manifest.names, "never")

    async def measure() -> tuple[float, list[ChatCompletion]]:
        async with asynchronous as client:
            first = await ask(client, prompt, {"report": True, "categories": never})
            margin = report_of(first)["decisions"]["safety"]["margin"]
            refusal = {
                "decision": "sample",
                "categories": {**never, "safety": {"bias": -margin}},
            }
            answers = await asyncio.gather(
                *(ask(client, prompt, refusal, temperature=1, seed=seed) for seed in range(400))
            )
            return margin, list(answers)

    _, answers = asyncio.run(measure())
    refused = sum(refused_for(answer) == "safety" for answer in answers)
    assert 160 <= refused <= 240


def test_sample_with_a_seed_repeats_itself(
    asynchronous: AsyncOpenAI, evaluation: list[Row]
) -> None:
    prompt = prompts_of(evaluation, "indeterminate", 1)[0]
    refusal = {"decision": "sample", "categories": {"indeterminate": 0.1}}
    cases = [(prompt, refusal)] * 20
    answers = asyncio.run(ask_all(asynchronous, cases, temperature=1, seed=5, max_tokens=8))
    texts = {a.choices[0].message.content or a.choices[0].message.refusal for a in answers}
    assert len(texts) == 1


def test_paper_rule_thresholds_the_top_category_only(
    asynchronous: AsyncOpenAI, manifest: Manifest, evaluation: list[Row]
) -> None:
    """With T = 0 every prompt is refused for its largest refusal token, whichever was asked."""
    prompts = prompts_of(evaluation, None, 10)
    everything = {"decision": "paper", "categories": dict.fromkeys(manifest.names, "always")}
    cases = [(p, {**everything, "report": True}) for p in prompts]
    for answer in asyncio.run(ask_all(asynchronous, cases)):
        decisions = report_of(answer)["decisions"]
        top = max(manifest.names, key=lambda name: decisions[name]["margin"])
        assert refused_for(answer) == top


def test_paper_rule_reads_the_models_own_probabilities(
    asynchronous: AsyncOpenAI, evaluation: list[Row]
) -> None:
    """A bias on other tokens moves the whole distribution, and must not move the decision."""
    prompts = prompts_of(evaluation, "safety", 20)
    refusal = {"decision": "paper", "categories": {"safety": 0.5}}
    cases = [(p, {**refusal, "report": report}) for p in prompts for report in (False, True)]
    biased = {"extra_body": {"logit_bias": {"300": 100, "301": 100}, "min_tokens": 1}}
    answers = asyncio.run(ask_all(asynchronous, cases, **biased))
    assert sum(refused_for(answer) == "safety" for answer in answers) >= 24
    for plain, with_report in zip(answers[::2], answers[1::2], strict=True):
        assert refused_for(plain) == refused_for(with_report)
