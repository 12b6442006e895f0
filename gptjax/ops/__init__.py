"""The operations that the model consists of, for CPUs, GPUs and TPUs."""
