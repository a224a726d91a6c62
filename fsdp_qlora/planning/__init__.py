"""What will happen: GiB by row and phase, seconds by bottleneck, what fits; no torch."""
