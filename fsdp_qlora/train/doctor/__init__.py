"""`python -m fsdp_qlora doctor`: what works here, how fast it is, and what to do about the rest."""
