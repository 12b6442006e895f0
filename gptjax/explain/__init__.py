"""The page that shows how a model reads one text (`data.py` computes it, `page.py` writes it)."""
