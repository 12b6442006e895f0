"""Checkpoints: orbax writes and reads them, and a checksum verifies every array."""
