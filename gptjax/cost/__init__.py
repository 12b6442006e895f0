"""The cost of a train step: estimated for a machine that is not here, or timed on this machine."""
