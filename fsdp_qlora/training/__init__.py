"""The training: steps, losses, optimizer, checkpoints, metrics."""
