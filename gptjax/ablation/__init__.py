"""The ablation and transfer tables of the paper: fine-tuning runs for each variant and seed."""
