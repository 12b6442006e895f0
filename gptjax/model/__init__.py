"""The decoder, its losses and objective, and the number of its floating-point operations."""
