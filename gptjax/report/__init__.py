"""Shows the results of a run as plots and as a table."""
