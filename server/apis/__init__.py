"""Each API of the wire: control tokens in earlier turns, refusals in answers."""
