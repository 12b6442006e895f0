"""Data without a download: the docstrings of the Python standard library."""
