"""What becomes of a run: adapters and models on disk, merged, quantised, expanded, on the hub."""
