"""The results of a run as plots and a table."""
