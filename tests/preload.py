"""What every test rank needs, imported once in the fork server (see ranks.py)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import accelerate
import safetensors.torch
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2

from fsdp_qlora.model import load, quantize, shard, skeleton
from fsdp_qlora.results import export
from fsdp_qlora.train import loop

quantize.import_bitsandbytes()
__all__ = ["accelerate", "export", "load", "loop", "safetensors", "shard", "skeleton"]
