"""`python -m fsdp_qlora bench`: what a setting takes, and ours against its peers, measured."""
