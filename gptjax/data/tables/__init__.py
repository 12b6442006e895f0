"""Labelled rows and running text: from files and from the Hugging Face hub."""
