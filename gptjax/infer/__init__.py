"""The use of a trained model: predictions, scores and generated text."""
