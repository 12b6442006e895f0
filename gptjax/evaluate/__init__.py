"""Scores of a model: metrics, losses on a split, zero-shot probes."""
