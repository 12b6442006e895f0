"""Reads programs that XLA has compiled: operations, communication, memory."""
