"""Files and their errors, folders in buckets, and the console."""
