"""What each API of the wire makes of earlier turns and of a decision."""
