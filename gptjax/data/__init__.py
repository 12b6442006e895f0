"""Data: from files and data sets of the hub to token ids and batches.

Nothing in this package imports the model.
"""
