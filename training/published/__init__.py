"""Checkpoints that the package carries: only what a training changed of a public base model."""
