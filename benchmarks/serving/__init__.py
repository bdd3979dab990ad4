"""How fast is the server, against stock vLLM and against what people use instead?"""
