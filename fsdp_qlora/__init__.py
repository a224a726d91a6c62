"""fsdp_qlora: fine-tune large language models on 4-bit weights sharded over the GPUs people own."""

__version__ = "0.1.0"
