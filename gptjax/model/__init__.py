"""The decoder, its losses, the objective, and the number of floating-point operations."""
