"""The run: from a recipe to a checkpoint."""
