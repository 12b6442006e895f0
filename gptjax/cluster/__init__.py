"""The processes of a run: their start, their communication, and the request to stop."""
