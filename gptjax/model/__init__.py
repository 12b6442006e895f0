"""The decoder, its losses, and the count of its operations."""
