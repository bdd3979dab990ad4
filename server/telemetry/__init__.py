"""Metrics, the decision trace and recorded margins."""
