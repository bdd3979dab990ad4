"""What does the steering cost against stock vLLM?"""
