"""Training: the two phases, checkpoints, resuming, evaluation by epoch."""
