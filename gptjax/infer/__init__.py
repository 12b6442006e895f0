"""A trained model in use: predictions, scores and generated text."""
