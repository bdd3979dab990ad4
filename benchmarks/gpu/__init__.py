"""Everything that needs a real GPU, in one command."""
