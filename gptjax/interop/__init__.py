"""Weights in the formats of others: OpenAI's release and Hugging Face folders."""
