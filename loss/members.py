"""The losses that the flexible family holds exactly: `flexible_loss(log_probs, *QUADRATIC)`."""

from typing import NamedTuple


class Member(NamedTuple):
    """Where a known loss sits in the family (1-p)^gamma · (1-p^q)/q.

    Attributes:
        q: Exponent of the probability of the true class.
        gamma: Exponent of the remaining probability.
    """

    q: float
    gamma: float


CROSS_ENTROPY = Member(0.0, 0.0)
"""-log p."""

HALF_ABSOLUTE = Member(1.0, 0.0)
"""1-p: half the absolute error (MAE) between one-hot target and probabilities, over all classes."""

QUADRATIC = Member(1.0, 1.0)
"""(1-p)²: for two classes the Brier score as Brier's successors write it, half his own sum."""

EXPONENTIAL = Member(-1.0, 0.0)
"""1/p - 1: for two classes exp(-margin), AdaBoost's loss on the difference of the logits."""


def focal(gamma: float) -> Member:
    """Returns the focal loss, -(1-p)^gamma · log p.

    Source:
        Lin and others, Focal Loss for Dense Object Detection, arXiv 1708.02002, equation 4.
    """
    return Member(0.0, gamma)


def generalised_cross_entropy(q: float) -> Member:
    """Returns the generalised cross-entropy, (1-p^q)/q.

    Source:
        Zhang and Sabuncu, Generalized Cross Entropy Loss, arXiv 1805.07836, equation 6.
    """
    return Member(q, 0.0)
