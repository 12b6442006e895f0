"""Scores of a model: metrics, losses on a split, and zero-shot probes."""
