"""What the user sees of a run besides its metrics: its facts, and the model before and after."""

import contextlib
import math
import resource
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.arch import ModelInfo, lora_params, num_params
from fsdp_qlora.config import Config, cfg_notes, to_dict
from fsdp_qlora.data import Data
from fsdp_qlora.errors import one_line
from fsdp_qlora.model.cache import PackedCache
from fsdp_qlora.model.kernels import Choice
from fsdp_qlora.model.load import LoadReport
from fsdp_qlora.model.placement import Placed
from fsdp_qlora.model.skeleton import PackedModel
from fsdp_qlora.results.generate import answer
from fsdp_qlora.train import loop, memory
from fsdp_qlora.train.ledger import Recorder

GIB = 2**30


def describe(
    cfg: Config,
    info: ModelInfo,
    data: Data,
    model: PackedModel,
    chosen: Choice,
    cache: PackedCache,
    placed: Placed,
    loaded: LoadReport,
    load_peaks: dict[str, float],
) -> dict[str, Any]:
    """Collect the facts of a run.

    Args:
        cfg: the run.
        info, model: what is trained.
        data: on what.
        chosen: kernels.
        cache, placed, loaded: where the packed bytes came from and lie.
        load_peaks: of `watch_memory` around the load, GiB.

    Returns:
        For the record, by name; `lines` are what the console shows.
    """
    trainable = lora_params(info, cfg.lora_rank, cfg.lora_target_modules)
    total = num_params(info)
    packed_gib = model.layout.nbytes * info.num_layers / GIB
    lines = [
        f"model     {cfg.model_name}: {total:,} parameters, {info.num_layers} layers in "
        f"{cfg.format_name} ({packed_gib:.2f} GiB packed)",
        f"adapter   {trainable:,} trainable parameters ({trainable / total:.2%})",
        f"kernels   {chosen.note}",
        f"placement {placed.note}",
        f"loaded    {loaded}",
        f"          peak {load_peaks['host_peak_used_gib']:.1f} GiB of host memory in use (all "
        f"programs), {load_peaks['device_peak_reserved_gib']:.1f} GiB reserved on a card",
        f"cache     {cache.note}",
        f"data      {data.audit}",
        *(f"note      {note}" for note in cfg_notes(cfg)),
    ]
    return {
        "config": to_dict(cfg),
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
        "lines": lines,
    }


@contextlib.contextmanager
def watch_memory(device: torch.device) -> Iterator[dict[str, float]]:
    """Peaks of memory, GiB, while the block runs; the dict is filled at its end.

    Args:
        device: of this rank.

    Yields:
        device_peak_allocated_gib, device_peak_reserved_gib, host_peak_rss_gib (of this process,
        ever) and host_peak_used_gib (of the whole machine).
    """
    peaks: dict[str, float] = {}
    with memory.HostSampler() as sampler:
        memory.device_memory(device)
        yield peaks
    now = memory.device_memory(device)
    peaks |= {name: now[name] for name in now if "peak" in name}
    peaks["host_peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peaks["host_peak_used_gib"] = sampler.peak_used_gib


@dataclass
class Look:
    """Held-out loss and the answer to one prompt, at the start and at the end of a run.

    Attributes:
        trained: what is looked at.
        data: held_out batches and sample_prompt, either of which may be empty.
        cfg: sample_prompt as the user wrote it, sample_tokens.
        recorder: gets the events and the lines.
        seen: "before" or "after" -> (loss, answer), None where not looked at.
    """

    trained: loop.Trained
    data: Data
    cfg: Config
    recorder: Recorder
    seen: dict[str, tuple[float | None, str | None]] = field(default_factory=dict)

    def __call__(self, when: str) -> None:
        """Look at the model; every rank must call.

        Args:
            when: "before" or "after".
        """
        loss = text = None
        if self.data.held_out:
            loss = loop.evaluate(self.trained.model, self.data.held_out, self.trained.world)
            self.recorder.event("eval", {"when": when, "loss": loss, "perplexity": math.exp(loss)})
        if self.data.sample_prompt:
            text = answer(
                self.trained.model,
                self.data.tokenizer,
                self.data.sample_prompt,
                self.cfg.sample_tokens,
                self.trained.world.device,
            )
            prompt = {"prompt": self.cfg.sample_prompt, "answer": text}
            self.recorder.event("sample", {"when": when, **prompt})
        self.seen[when] = (loss, text)
        if when == "after":
            self._compare()
        self.recorder.clock.restart()

    def _compare(self) -> None:
        (loss, text), (new_loss, new_text) = self.seen["before"], self.seen["after"]
        if loss is not None and new_loss is not None:
            self.recorder.say(
                f"held-out  loss {loss:.3f} -> {new_loss:.3f}, "
                f"perplexity {math.exp(loss):.2f} -> {math.exp(new_loss):.2f}"
            )
        if text is not None:
            rows = {"prompt": self.cfg.sample_prompt, "before": text, "after": new_text}
            for name, words in rows.items():
                self.recorder.say(f"{name:<9} {one_line(str(words))}")


def farewell(cfg: Config) -> str:
    """Say where the results are, and what to try next.

    Args:
        cfg: gives the directory.

    Returns:
        Two lines for the console.
    """
    out = Path(cfg.resolved_output_dir)
    return (
        f"saved     {out}: adapter in peft's format, metrics.jsonl, summary.json, report.svg\n"
        f"next      python train.py --model_name {cfg.model_name} --dataset YOUR_ROWS.jsonl"
    )
