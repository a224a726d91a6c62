"""What will happen: GiB by row and phase, seconds by bound, the setting that fits; no torch."""
