"""The HTTP service: vLLM's own server, with a decision at the first step of every answer."""
