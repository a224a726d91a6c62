"""What ranks (ranks.py) and whole runs (warm.py) need, imported once in their fork server.

There is one for all tests: whoever starts it first decides what it has imported.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import gc
import importlib
import sys

from transformers import conversion_mapping

from fsdp_qlora.model import quantize

for name in (
    "accelerate",
    "encodings.idna",
    "numpy.ma",
    "peft",
    "safetensors.torch",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "tests.warm",
    "fsdp_qlora.run",
    "fsdp_qlora.data",
    "fsdp_qlora.model.attention",
    "fsdp_qlora.model.load",
    "fsdp_qlora.model.shard",
    "fsdp_qlora.model.skeleton",
    "fsdp_qlora.export.model_files",
    "fsdp_qlora.inference",
    "fsdp_qlora.training.evaluate",
    "fsdp_qlora.report.page",
    "fsdp_qlora.training.loop",
    "fsdp_qlora.training.memory_probe",
    "fsdp_qlora.training.checkpoint",
):
    try:
        importlib.import_module(name)
    except ImportError as error:  # the fork server would go on without the rest, and say nothing
        sys.exit(f"tests/preload.py: {error}")
quantize.import_bitsandbytes()
conversion_mapping.get_checkpoint_conversion_mapping("llama")  # makes a thousand patterns once
gc.collect()
gc.freeze()  # a forked process collects its own garbage only
