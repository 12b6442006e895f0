"""Weights in other formats: OpenAI's release and Hugging Face's folders."""
