"""The operations of the model, for CPUs, GPUs and TPUs."""
