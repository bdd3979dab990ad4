"""`rheostat evaluate`: what a served checkpoint decides on labelled prompts, with intervals."""
