"""Checkpoints: orbax writes and reads them, and every array is verified by a checksum."""
