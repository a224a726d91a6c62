"""What every test rank needs, imported once in the fork server (see ranks.py)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib

from fsdp_qlora.model import quantize

for name in (
    "accelerate",
    "safetensors.torch",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "fsdp_qlora.model.load",
    "fsdp_qlora.model.shard",
    "fsdp_qlora.model.skeleton",
    "fsdp_qlora.results.export",
    "fsdp_qlora.train.loop",
):
    importlib.import_module(name)
quantize.import_bitsandbytes()
