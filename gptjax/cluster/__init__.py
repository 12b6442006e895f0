"""Several processes of one run: start-up, agreement, and the request to stop."""
