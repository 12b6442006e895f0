"""The ablation and transfer tables of the paper: fine-tunings by variant and seed."""
