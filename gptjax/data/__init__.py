"""From files and hub ids to token ids, rows and batches. Nothing here imports the model."""
