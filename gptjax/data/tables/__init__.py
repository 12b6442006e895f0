"""Labelled rows and running text, from files, the Hugging Face hub and tables in memory."""
