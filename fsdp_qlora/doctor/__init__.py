"""`python -m fsdp_qlora doctor`: what works on this machine, how fast it is, and what to do."""
