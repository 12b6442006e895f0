"""The conversion of text to token ids."""
