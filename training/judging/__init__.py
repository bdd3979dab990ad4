"""Who says that a text refuses: rules, a judge model, and how far they agree."""
