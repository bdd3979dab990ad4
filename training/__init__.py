"""Training, calibration and evaluation of checkpoints with control tokens.

Nothing heavy is imported at package level: torch, trl and scikit-learn come with the modules that
need them.
"""
