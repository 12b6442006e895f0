"""The results of a run, as plots and as a table."""
