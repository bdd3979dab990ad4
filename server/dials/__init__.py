"""From what a request asks for to the biases that it gets."""
