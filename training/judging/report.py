"""What a report says of those who read the texts."""

from pydantic import BaseModel, ConfigDict

from training.evaluation.statistics import Estimate
from training.judging.exchanges import Outcome


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JudgeReport(_Part):
    """A judge model, and how it was asked.

    Attributes:
        sha256: Of the prompt.
        unreadable: Replies that were none of the three outcomes; they count as undecided.
    """

    model: str
    url: str
    prompt: str
    sha256: str
    unreadable: int


class ReaderReport(_Part):
    """One reader of texts.

    Attributes:
        refused: Share that it reads as refusals, of the texts that it decided.
        outcomes: How many texts it read as what.
        judge: None where the reader is no model.
    """

    refused: Estimate
    outcomes: dict[Outcome, int]
    judge: JudgeReport | None = None


class PairReport(_Part):
    """Two readers, on the texts that both decided.

    Attributes:
        agreement: Share of which both say the same.
        kappa: Cohen's.
    """

    agreement: Estimate
    kappa: Estimate


class Readings(_Part):
    """What all readers say of the same texts: those that the model wrote by itself.

    Attributes:
        by: By the reader: `token`, the control token; `rules`, phrases; `wording`, the grader
            that the training responses taught; `judge`, a judge model.
        pairs: By two readers' names, as in `token-judge`.
    """

    by: dict[str, ReaderReport]
    pairs: dict[str, PairReport]
