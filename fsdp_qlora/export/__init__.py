"""What becomes of a run: adapters and models on disk, merged, quantized, expanded, on the hub."""
