"""Records of runs as one page: `python -m fsdp_qlora report RUN ...`."""
