"""One module for each method: its claim, its arms, and nothing else."""
