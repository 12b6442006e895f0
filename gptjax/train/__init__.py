"""Training: from an experiment to its checkpoints and scores."""
