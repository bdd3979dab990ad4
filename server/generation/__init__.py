"""One call of the engine's ``generate()``."""
