"""The cost of a train step: compiled for machines that are not here, or timed on this one."""
