"""The measurements: how a model decides and what its texts do."""
