"""What many requests a second take: measured pieces, a simulation, and its check."""
