"""`python -m fsdp_qlora report`: records of runs as a page, as Markdown and as pictures."""
