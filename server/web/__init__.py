"""The HTTP layer around vLLM's own: access, bounds, bodies, the guard, errors."""
