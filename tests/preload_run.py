"""What a whole run imports besides, and the state that makes it cheap to fork (see warm.py)."""

import gc
import importlib

for name in (
    "fsdp_qlora.data",
    "fsdp_qlora.model.attention",
    "fsdp_qlora.results.look",
    "fsdp_qlora.results.report",
    "fsdp_qlora.results.session",
    "fsdp_qlora.train.checkpoint",
    "fsdp_qlora.train.going_on",
    "fsdp_qlora.train.profiler",
    "fsdp_qlora.train.rehearsal",
    "fsdp_qlora.train.versions",
    "peft",
    "train",
):
    importlib.import_module(name)
gc.collect()
gc.freeze()  # a forked run collects its own garbage only
