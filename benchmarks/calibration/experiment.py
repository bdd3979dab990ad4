"""What `benchmarks.calibration` measures."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from models.calibration import BENIGN, Calibration, save_calibration
from models.confidence import refusals_allowed
from models.controls import Rule, dial_row
from models.decision import Dials, decide
from models.errors import RequestError
from models.solver import Solution, Target, solve
from training.calibration.calibrate import Job, calibrate
from training.calibration.prompts import Prompts
from training.config.data import named_sources
from training.data.rows import Row
from training.serving import serving, without_calibrations

BOUND = 0.02
RATES = tuple(step / 10 for step in range(1, 10))
Z95 = 1.959964
SERVER_FLAGS = ("--enforce-eager", "--dtype", "float32")
REQUESTS_AT_ONCE = 32
SERVED = "demo"

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]


class Case(NamedTuple):
    """One category's rate, asked for and achieved.

    Attributes:
        together: Whether all categories were asked for the same rate at once.
        calibrated: The rate on the prompts that it was solved on.
        achieved: The rate on the others.
        reachable: Whether the solver said that the rate can be met.
        within: Whether the two differ by no more than two such samples do in 95 % of cases.
    """

    category: str
    together: bool
    asked: float
    calibrated: float
    achieved: float
    reachable: bool
    within: bool


def refused(calibration: Calibration, solution: Solution) -> Flags:
    """Returns which prompts the served decision refuses with a solution's biases, `[n]`."""
    margins = torch.tensor(calibration.margins)
    rows, k = margins.shape
    row = dial_row(solution.biases, [True] * k, Rule.GREEDY, 0.0, 0.0)
    dials = Dials(torch.tensor([row]), k)
    logits = torch.cat((margins, torch.zeros((rows, 1))), dim=1)
    chosen: Flags = (decide(logits, dials, [Rule.GREEDY]) < k).numpy()
    return chosen


def share(calibration: Calibration, chosen: Flags, category: int) -> float:
    """Returns the share of a category's own prompts that are chosen."""
    return float(chosen[calibration.category == category].mean())


def rate_cases(calibration: Calibration, evaluation: Calibration) -> list[Case]:
    """Asks for every rate in every category, alone and all together."""
    names = calibration.names
    cases = []
    for asked in RATES:
        alone = [(solve(calibration, {name: Target(rate=asked)}), [name]) for name in names]
        every = solve(calibration, {name: Target(rate=asked) for name in names})
        for solution, measured in [*alone, (every, list(names))]:
            seen, unseen = refused(calibration, solution), refused(evaluation, solution)
            for name in measured:
                at = names.index(name)
                rates = (share(calibration, seen, at), share(evaluation, unseen, at))
                sizes = (calibration.prompts[name], evaluation.prompts[name])
                reachable = solution.expected[at].reachable
                together = len(measured) > 1
                within = differ_as_samples(*rates, *sizes)
                cases.append(Case(name, together, asked, *rates, reachable, within))
    return cases


def differ_as_samples(first: float, second: float, first_n: int, second_n: int) -> bool:
    """Returns whether two shares differ by no more than two samples of one share mostly do.

    The interval is the usual one of a difference of two shares, with the pooled share.
    """
    pooled = (first * first_n + second * second_n) / (first_n + second_n)
    spread = math.sqrt(pooled * (1 - pooled) * (1 / first_n + 1 / second_n))
    return abs(first - second) <= Z95 * spread + 1e-12


def movement(calibration: Calibration, evaluation: Calibration) -> Floats:
    """Returns by how much every category's rate moves as one category's goes from 10 to 90 %.

    Returns:
        `[k, k]`: row the category that was moved, column the one whose rate was counted.
    """
    names = calibration.names
    moved = np.zeros((len(names), len(names)))
    for row, name in enumerate(names):
        low, high = (
            refused(evaluation, solve(calibration, {name: Target(rate=rate)}))
            for rate in (RATES[0], RATES[-1])
        )
        for column in range(len(names)):
            moved[row, column] = share(evaluation, high, column) - share(evaluation, low, column)
    return moved


def shared(calibration: Calibration, evaluation: Calibration) -> Floats:
    """Returns the share of each category's prompts whose decision hangs on another's bias.

    Between the two biases of `movement`, a prompt of category `column` crosses the threshold of
    category `row` where its margin there lies between them, and no other category refuses it.
    That is all that can move a rate.

    Returns:
        `[k, k]`, rows and columns as in `movement`.
    """
    names = calibration.names
    found = np.zeros((len(names), len(names)))
    for row, name in enumerate(names):
        low, high = (
            solve(calibration, {name: Target(rate=rate)}).biases[row]
            for rate in (RATES[0], RATES[-1])
        )
        own = evaluation.margins[:, row]
        others = np.delete(evaluation.margins, row, axis=1)
        free = (others < 0).all(axis=1) if others.size else np.ones(len(own), dtype=bool)
        crossing = (own + high >= 0) & (own + low < 0) & free
        for column in range(len(names)):
            found[row, column] = share(evaluation, crossing, column)
    return found


def bound_holds(
    prompts: Calibration, splits: int, bound: float, seed: int, category: str | None
) -> dict[str, float]:
    """Splits prompts in halves at random; solves a bound on one, counts it on the other.

    Args:
        category: The one that the bound is for; None for all in total.

    Returns:
        How many splits kept the bound on the other half, how likely one does at least, and mean
        and largest share there.
    """
    rng = np.random.default_rng(seed)
    shares = []
    for _ in range(splits):
        order = rng.permutation(len(prompts.category))
        half, other = (part(prompts, places) for places in np.array_split(order, 2))
        if category is None:
            solution = solve(half, {}, total_false_refusal_rate=bound)
            chosen = refused(other, solution)
        else:
            solution = solve(half, {category: Target(false_refusal_rate=bound)})
            at = prompts.names.index(category)
            chosen = other.margins[:, at] + np.float32(solution.biases[at]) >= 0
        shares.append(share(other, chosen, BENIGN))
    kept = sum(found <= bound for found in shares)
    return {
        "splits": splits,
        "kept": kept,
        "chance": chance_kept(prompts, bound),
        "mean": float(np.mean(shares)),
        "largest": float(np.max(shares)),
    }


def chance_kept(prompts: Calibration, bound: float) -> float:
    """Returns how likely a random halving keeps a bound on the other half, at least.

    The same for every distribution and every category. A half has n1 of the N benign prompts with
    hypergeometric chances. Of all N, falling, more than the bound lie above the half's (r + 1)-th
    exactly if among the first r + x at most r are of that half, r the number that may be refused
    and x the number that the other half must not reach. The threshold lies midway to the r-th, and
    ties are not refused: so fewer may be above it.
    """
    from scipy.stats import hypergeom

    every, benign = len(prompts.category), prompts.benign
    in_half = hypergeom(every, benign, -(-every // 2))
    first, last = in_half.ppf((1e-9, 1 - 1e-9)).astype(int).tolist()
    broken = 0.0
    for own in range(first, last + 1):
        allowed = refusals_allowed(own, bound)
        too_many = math.floor(bound * (benign - own) + 1e-9) + 1
        if allowed >= 0:
            exceeds = hypergeom(benign, own, allowed + too_many).cdf(allowed)
            broken += float(in_half.pmf(own) * exceeds)
    return 1 - broken


def part(prompts: Calibration, places: NDArray[np.integer]) -> Calibration:
    """Returns the calibration of some of the prompts."""
    return replace(
        prompts,
        margins=prompts.margins[places],
        log_normaliser=prompts.log_normaliser[places],
        category=prompts.category[places],
    )


def pooled(first: Calibration, second: Calibration) -> Calibration:
    """Returns the calibration of both sets of prompts."""
    return replace(
        first,
        margins=np.concatenate((first.margins, second.margins)),
        log_normaliser=np.concatenate((first.log_normaliser, second.log_normaliser)),
        category=np.concatenate((first.category, second.category)),
    )


async def requested(url: str, rows: Sequence[Row], refusal: dict[str, Any]) -> Flags:
    """Sends real requests and returns which of them were refused, `[rows]`."""
    slots = asyncio.Semaphore(REQUESTS_AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:

        async def one(row: Row) -> bool:
            messages = [{"role": turn.role, "content": turn.content} for turn in row.prompt]
            body = {"model": SERVED, "messages": messages, "max_tokens": 1, "refusal": refusal}
            async with slots:
                answer = await client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            return answer.headers["x-refusal-decision"] == "refuse"

        return np.array(await asyncio.gather(*(one(row) for row in rows)))


def request_cases(
    model: Path, calibration: Calibration, evaluation: Calibration, rows: Sequence[Row], log: Path
) -> list[dict[str, Any]]:
    """Serves a checkpoint with its calibration and asks it for rates in real requests."""
    names = calibration.names
    asked: list[dict[str, float]] = [{names[0]: 0.3}, dict.fromkeys(names, 0.5)]
    found = []
    with without_calibrations(model) as folder:
        save_calibration(folder, calibration)
        with serving(folder, SERVED, log, SERVER_FLAGS, inherit_settings=False) as url:
            for rates in asked:
                dials = {
                    "calibration": calibration.info.name,
                    "categories": {name: {"rate": rate} for name, rate in rates.items()},
                }
                served = asyncio.run(requested(url, rows, dials))
                targets = {name: Target(rate=rate) for name, rate in rates.items()}
                offline = refused(evaluation, solve(calibration, targets))
                found.append(
                    {
                        "asked": rates,
                        "requests": len(rows),
                        "decided_as_offline": int((served == offline).sum()),
                        "achieved": {
                            name: share(evaluation, served, names.index(name)) for name in rates
                        },
                    }
                )
    return found


def measured(
    model: Path, data: Sequence[Path], out: Path, console: Console
) -> tuple[Calibration, ...]:
    """Reads the margins of files of prompts off one engine."""
    log = out / "server.log"
    found = []
    with (
        without_calibrations(model) as folder,
        serving(folder, SERVED, log, SERVER_FLAGS, inherit_settings=False) as url,
    ):
        for path in data:
            job = Job(model, Prompts(named_sources(path)), name=path.stem, url=url, out=out)
            found.append(calibrate(job, console))
            console.print(found[-1].sentence())
    return tuple(entry.calibration for entry in found)


def experiment(
    calibration: Calibration, evaluation: Calibration, splits: int, console: Console
) -> tuple[list[Case], dict[str, Any]]:
    """Runs everything that needs no server."""
    names = calibration.names
    every = pooled(calibration, evaluation)
    bounds = {}
    if calibration.benign and evaluation.benign:
        kinds: list[str | None] = [None, *names]
        for kind in track(kinds, "bounds", console=console):
            try:
                bounds[kind or "all together"] = bound_holds(every, splits, BOUND, 0, kind)
            except RequestError as error:
                console.print(f"{kind or 'all together'}: {error.message}")
    return rate_cases(calibration, evaluation), {
        "moved": movement(calibration, evaluation).tolist(),
        "shared": shared(calibration, evaluation).tolist(),
        "bounds": bounds,
    }
