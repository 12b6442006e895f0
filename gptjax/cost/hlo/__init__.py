"""Reads compiled XLA programs: their operations, communication and memory."""
