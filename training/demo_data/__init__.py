"""The demo's training data: readable templates (YAML) and the renderer that samples rows."""
