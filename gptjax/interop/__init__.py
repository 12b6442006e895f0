"""Models in other formats: OpenAI's release of GPT-1, and folders of Hugging Face."""
