"""Losses on log-probabilities: `loss.flexible` has the family, `loss.members` names its members."""
