"""The cost of a step: compiled for machines that are not here, or timed on this one."""
