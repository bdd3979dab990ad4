"""A loss parameter that moves during the training."""

import math


def parameter_at(start: float, end: float, over: float, progress: float) -> float:
    """Returns a parameter that goes evenly from `start` to `end` and then stays.

    Args:
        start: Value at the first step.
        end: Value from `over` on, exactly.
        over: Share of the steps that the way takes, above 0 and at most 1.
        progress: Share of the steps that are done, 0 to 1.

    Raises:
        ValueError: `over` or `progress` out of range, or a value that is not finite.
    """
    if not 0.0 < over <= 1.0:
        raise ValueError(f"over must be above 0 and at most 1, not {over}")
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be 0 to 1, not {progress}")
    if not (math.isfinite(start) and math.isfinite(end)):
        raise ValueError(f"start and end must be finite, not {start} and {end}")
    gone = progress / over
    return end if gone >= 1.0 else start + gone * (end - start)
