"""Has all readers read the same texts."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple

from training.evaluation.statistics import counted
from training.judging.agreement import pairs
from training.judging.exchanges import OUTCOMES, Exchange, Outcome
from training.judging.model import JudgeModel, Memory, ModelReader
from training.judging.report import JudgeReport, ReaderReport, Readings
from training.judging.rules import outcome_of


class Readers(NamedTuple):
    """Who reads the texts, beside the control token and what the training responses taught."""

    rules: bool = False
    judge: JudgeModel | None = None

    @property
    def needed(self) -> bool:
        """Whether there is any."""
        return self.rules or self.judge is not None


async def read_texts(
    exchanges: Sequence[Exchange],
    known: Mapping[str, Sequence[Outcome]],
    readers: Readers,
    memory: Memory,
    told: Callable[[], object],
    seed: int = 0,
) -> Readings:
    """Returns what all readers say, and how far they agree.

    Args:
        known: Outcomes that are known already, by the reader's name.
        memory: What the judge said before.
        told: Called after each text that the judge has read.

    Raises:
        EvaluationError: The judge does not answer.
    """
    read = dict(known)
    judge: JudgeReport | None = None
    if readers.rules:
        read["rules"] = [outcome_of(exchange.text) for exchange in exchanges]
    if readers.judge is not None:
        async with aclosing(ModelReader(readers.judge, memory, told)) as reader:
            read["judge"] = await reader.read(exchanges)
        judge = described(readers.judge, reader.unreadable)
    return Readings(
        by={
            name: _reader(outcomes, judge if name == "judge" else None)
            for name, outcomes in read.items()
        },
        pairs=pairs(read, seed),
    )


def described(judge: JudgeModel, unreadable: int) -> JudgeReport:
    """Returns what a report says of a judge model."""
    return JudgeReport(
        model=judge.model,
        url=judge.url,
        prompt=judge.prompt,
        sha256=judge.prompt_sha256,
        unreadable=unreadable,
    )


def _reader(outcomes: Sequence[Outcome], judge: JudgeReport | None) -> ReaderReport:
    counts = {outcome: outcomes.count(outcome) for outcome in OUTCOMES}
    decided = len(outcomes) - counts["undecided"]
    return ReaderReport(
        refused=counted(counts["refused"], decided, "no text was decided"),
        outcomes=counts,
        judge=judge,
    )
