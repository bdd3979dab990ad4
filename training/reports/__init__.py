"""What becomes of an evaluation: table, HTML, model card, gate, comparison."""
