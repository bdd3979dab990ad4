"""The load: vLLM's own `bench serve`, with another body for every request.

`vllm bench serve` streams every chat. A plain chat and a chat behind a guard are request functions
of ours that its loop calls like its own.
"""

import asyncio
import io
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.lib.endpoint_request_func import (
    ASYNC_REQUEST_FUNCS,
    RequestFuncInput,
    RequestFuncOutput,
    async_request_openai_chat_completions,
)
from vllm.benchmarks.serve import TaskType, benchmark

from benchmarks.serving.cells import Body, Load

PATH = "/v1/chat/completions"
MODEL = "demo"
# Most warm-up requests of a round: they open connections and fill caches of the processor.
WARM_UP = 4
GUARD_TOKENS = 2
GUARD_PROMPT = (
    "Task: say whether the user's message is safe. Unsafe are: requests for something harmful, "
    "messages that take you for a human, messages that lack information, questions that cannot be "
    "answered, and tasks that you cannot do. Answer with one word: safe or unsafe."
)


RequestFunction = Callable[..., Awaitable[RequestFuncOutput]]


class Round(NamedTuple):
    """What one round measured.

    Attributes:
        per_s: Requests a second.
        first_ms: Milliseconds to the first token of each request; of a plain one, to its answer.
        whole_ms: Milliseconds to the end of each request.
        http_us: Microseconds of CPU that a request takes of the server's first process; None where
            nobody looked. Engine and worker poll for work, so their CPU tells nothing.
    """

    per_s: float
    first_ms: list[float]
    whole_ms: list[float]
    http_us: float | None = None


@dataclass(frozen=True)
class Target:
    """Where a round goes.

    Attributes:
        url: The server's.
        guard_url: Of the server that is asked whether a message is safe; None asks nobody.
        parallel: Whether the guard is asked together with the server, not before it.
        headers: Of every request.
    """

    url: str
    guard_url: str | None = None
    parallel: bool = False
    headers: Mapping[str, str] | None = None


def sample_requests(
    prompts: Iterator[str], fields: Callable[[random.Random], Body], load: Load, rng: random.Random
) -> list[SampleRequest]:
    """Returns a round's requests.

    Args:
        prompts: Without end.
        fields: Draws what a request's body holds beside its messages.
        load: How many there are, and how long their answers.
        rng: What ``fields`` draws with.
    """
    requests = []
    for _ in range(load.requests):
        body = {"temperature": 0, **fields(rng)}
        turns = [{"role": "user", "content": next(prompts)}]
        if load.system:
            turns.insert(0, {"role": "system", "content": load.system})
        requests.append(
            SampleRequest(
                prompt="",
                prompt_len=1,
                expected_output_len=load.tokens,
                chat_messages=turns,
                request_overrides=body,
            )
        )
    return requests


def measure(target: Target, requests: list[SampleRequest], load: Load) -> Round:
    """Sends a round's requests, ``load.at_once`` at a time.

    Raises:
        RuntimeError: A request failed.
    """
    with redirect_stdout(io.StringIO()):
        found = asyncio.run(_benchmark(target, requests, load))
    if found["failed"]:
        errors = [error for error in found["errors"] if error]
        raise RuntimeError(f"{found['failed']} requests to {target.url} failed: {errors[0]}")
    return Round(
        found["request_throughput"],
        [1000 * seconds for seconds in found["ttfts"]],
        [1000 * seconds for seconds in found["latencies"]],
    )


async def _benchmark(target: Target, requests: list[SampleRequest], load: Load) -> dict[str, Any]:
    streamed = async_request_openai_chat_completions
    function: RequestFunction = streamed if load.stream else plain_chat
    connector = aiohttp.TCPConnector(limit=load.at_once)
    async with aiohttp.ClientSession(connector=connector) as session:
        if target.guard_url is not None:
            guard_url = target.guard_url + PATH
            function = Guarded(guard_url, session, function, target.parallel)
        return await _vllm_benchmark(target, function, requests, load)


async def _vllm_benchmark(
    target: Target, function: RequestFunction, requests: list[SampleRequest], load: Load
) -> dict[str, Any]:
    # vLLM looks its request functions up by name.
    ASYNC_REQUEST_FUNCS["this round's"] = function
    found: dict[str, Any] = await benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="this round's",
        api_url=target.url + PATH,
        base_url=target.url,
        model_id=MODEL,
        model_name=MODEL,
        tokenizer=None,
        input_requests=requests,
        logprobs=None,
        request_rate=float("inf"),
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=min(load.at_once, WARM_UP),
        profile=False,
        selected_percentile_metrics=[],
        selected_percentiles=[],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=load.at_once,
        lora_modules=None,
        extra_headers=dict(target.headers) if target.headers else None,
        extra_body=None,
        ready_check_timeout_sec=0,
    )
    return found


async def plain_chat(
    request_func_input: RequestFuncInput, session: aiohttp.ClientSession, pbar: object = None
) -> RequestFuncOutput:
    """Sends a chat that is not streamed; its first token is its answer."""
    asked = request_func_input
    body = {
        "model": asked.model_name,
        "messages": asked.chat_messages,
        "max_completion_tokens": asked.output_len,
        "ignore_eos": asked.ignore_eos,
        **(asked.extra_body or {}),
    }
    output = RequestFuncOutput(start_time=time.perf_counter())
    async with session.post(asked.api_url, json=body, headers=asked.extra_headers) as response:
        text = await response.text()
        output.latency = output.ttft = time.perf_counter() - output.start_time
        output.success = response.status == 200
        output.error = "" if output.success else text
    return output


@dataclass(frozen=True)
class Guarded:
    """A chat behind a guard: a second model that first says whether the message is safe.

    Attributes:
        url: The guard's route for chats.
        session: The guard's own: the benchmark's has no connection more than it needs itself.
        answer: Sends the chat itself.
        parallel: Whether both are asked at once; the answer then waits for the verdict.
    """

    url: str
    session: aiohttp.ClientSession
    answer: RequestFunction
    parallel: bool

    async def __call__(
        self,
        request_func_input: RequestFuncInput,
        session: aiohttp.ClientSession,
        pbar: object = None,
    ) -> RequestFuncOutput:
        """Returns the answer's output, timed from the start of the whole."""
        verdict = plain_chat(self._question(request_func_input), self.session)
        answer = self.answer(request_func_input, session)
        if self.parallel:
            said, output = await asyncio.gather(verdict, answer)
            output.ttft = max(output.ttft, said.latency)
            output.latency = max(output.latency, said.latency)
        else:
            said, output = await verdict, await answer
            output.ttft += said.latency
            output.latency += said.latency
            output.start_time = said.start_time
        output.success = output.success and said.success
        output.error = output.error or said.error
        return output

    def _question(self, request: RequestFuncInput) -> RequestFuncInput:
        return RequestFuncInput(
            prompt="",
            api_url=self.url,
            prompt_len=1,
            output_len=GUARD_TOKENS,
            model=request.model,
            model_name=request.model_name,
            extra_body={"temperature": 0},
            ignore_eos=True,
            chat_messages=[
                {"role": "system", "content": GUARD_PROMPT},
                *(request.chat_messages or []),
            ],
        )
