"""The recipe: what a training is told, read from YAML and validated."""
