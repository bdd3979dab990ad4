"""The calibration: from prompts with known categories to margins."""
