"""Files and their errors, folders in cloud buckets, and the console."""
