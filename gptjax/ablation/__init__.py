"""Makes the ablation and transfer tables of the paper (Radford et al. 2018)."""
