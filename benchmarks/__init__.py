"""What Rheostat costs, measured against stock vLLM in the same run."""
