"""Files: atomic writes, JSON, and buckets."""
