"""What the user sees of a run besides its metrics: its facts, and where the results are."""

import json
import mmap
import resource
from pathlib import Path
from typing import Any

import numpy as np

from fsdp_qlora.arch import ModelInfo, num_params, trained, unquantized
from fsdp_qlora.config import TRAIN_TYPES, Config, cfg_notes, to_dict
from fsdp_qlora.data import Data
from fsdp_qlora.hardware import GIB
from fsdp_qlora.model.load import Built
from fsdp_qlora.planning.run import RunPlan
from fsdp_qlora.training.memory import MemoryTracker, Peak

SAVED = dict.fromkeys(("lora", "dora"), "adapter in peft's format")
SAVED |= {"llama_pro": "new layers (merge makes a model of them)", "full": "the model"}


def describe(
    cfg: Config,
    info: ModelInfo,
    data: Data,
    built: Built,
    tracker: MemoryTracker,
) -> dict[str, Any]:
    """Collect the facts of a run.

    Args:
        cfg: the run.
        info, built: what is trained, and how it came to lie where it does.
        data: on what.
        tracker: of this rank's memory, its model loaded.

    Returns:
        For the record, by name; `lines` are what the console shows.
    """
    trainable = trained.count(info, cfg)
    total, load_peaks = num_params(info), _load_peaks(tracker)
    model, chosen, cache = built.model, built.chosen, built.cache
    placed, loaded = built.placed, built.loaded
    num_packed = info.num_layers - len(trained.whole(info, cfg).layers)
    packed_gib = model.layout.nbytes * num_packed / GIB
    lines = [
        f"model     {cfg.model_name}: {total:,} parameters, {info.num_layers} layers in "
        f"{cfg.format_name} ({packed_gib:.2f} GiB packed)",
        f"          not packed, in 16 bit: {_unpacked(info)}",
        f"adapter   {trainable:,} trainable parameters ({trainable / total:.2%})",
        f"kernels   {chosen.note}",
        f"placement {placed.note}",
        f"loaded    {loaded}",
        f"          peak {load_peaks['host_peak_used_gib']:.1f} GiB of host memory in use (all "
        f"programs), {load_peaks['device_peak_reserved_gib']:.1f} GiB reserved on a card",
        f"cache     {cache.note}",
        f"data      {data.audit}",
        *_planned_again(tracker.plan),
        *(f"note      {note}" for note in cfg_notes(cfg)),
    ]
    return {
        "config": to_dict(cfg),
        "plan": tracker.plan.to_dict(),
        "model_type": info.model_type,
        "num_params": total,
        "num_trainable_params": trainable,
        "packed_gib": packed_gib,
        "load_s": loaded.seconds,
        "load_source": loaded.source,
        "load_peaks": load_peaks,
        "kernels": chosen.note,
        "placement": placed.note,
        "quant_cache": cache.note,
        "data": data.audit.facts,
        "lines": lines,
    }


def _planned_again(plan: RunPlan) -> list[str]:
    """What the plan says now that the rows are known."""
    found = plan.found
    if found is None or not plan.rows_note:
        return []
    return [f"plan      {plan.rows_note}: {found.host.peak_gib:.1f} GiB on the host"]


def _unpacked(info: ModelInfo) -> str:
    """The matrices that no format packs, with their sizes."""
    found = unquantized(info).items()
    return ", ".join(
        f"{name.removesuffix('.weight')} {2 * num / GIB:.2f} GiB" for name, num in found
    )


def _load_peaks(tracker: MemoryTracker) -> dict[str, float]:
    """Peaks of memory in the load, GiB: of the rank's card and process, and of the whole host."""
    peak = tracker.peak_of("load") if tracker.is_cuda else Peak()
    return {
        "device_peak_allocated_gib": peak.allocated_gib,
        "device_peak_reserved_gib": peak.reserved_gib,
        "host_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "host_peak_used_gib": tracker.used_gib["load"],
    }


def nbytes(data: Data) -> int:
    """Bytes of tokens that this process holds for itself; mapped files are not counted.

    Args:
        data: of the run.
    """
    arrays = [value for value in vars(data.train.samples.store).values() if hasattr(value, "base")]
    own = [array for array in arrays if not isinstance(array, np.memmap)]
    return sum(array.nbytes for array in own if not isinstance(array.base, np.memmap | mmap.mmap))


def farewell(cfg: Config) -> str:
    """Say how long the training took, where the results are, and what to try next.

    Args:
        cfg: gives the directory, with summary.json.

    Returns:
        Three lines for the console.
    """
    out = Path(cfg.resolved_output_dir)
    done = json.loads((out / "summary.json").read_text())
    what = SAVED[TRAIN_TYPES[cfg.train_type].adapter]
    return (
        f"trained   {done['num_steps']:,} steps of {done['num_tokens']:,} tokens in all in "
        f"{done['train_s']:.1f} s: {done['steps_per_s']:.3g} steps/s, "
        f"{done['tokens_per_s']:,.0f} tok/s\n"
        f"saved     {out}: {what}, metrics.jsonl, summary.json, report.html\n"
        f"next      python train.py --model_name {cfg.model_name} --dataset YOUR_ROWS.jsonl"
    )
