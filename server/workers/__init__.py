"""What every process of vLLM's engines gets of ours, and the proof that it runs there."""
