"""Losses on log-probabilities. The flexible loss comes to stand here."""
