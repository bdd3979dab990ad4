"""Control tokens, the checkpoint contract and the decision mathematics.

Imports nothing else of this project, and neither torch nor vllm at package level.
"""
