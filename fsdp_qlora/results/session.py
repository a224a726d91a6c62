"""What the user sees of a run besides its metrics: its facts, and the model before and after."""

import math
import mmap
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fsdp_qlora.arch import ModelInfo, lora_params, num_params
from fsdp_qlora.config import Config, to_dict
from fsdp_qlora.conflicts import cfg_notes
from fsdp_qlora.data import Data
from fsdp_qlora.errors import one_line
from fsdp_qlora.model.build import Built
from fsdp_qlora.results.generate import answer
from fsdp_qlora.train import loop
from fsdp_qlora.train.ledger import Recorder
from fsdp_qlora.train.memory import Peak
from fsdp_qlora.train.rows import Account

GIB = 2**30


def describe(
    cfg: Config,
    info: ModelInfo,
    data: Data,
    built: Built,
    account: Account,
) -> dict[str, Any]:
    """Collect the facts of a run.

    Args:
        cfg: the run.
        info, built: what is trained, and how it came to lie where it does.
        data: on what.
        account: of this rank's memory, its model loaded.

    Returns:
        For the record, by name; `lines` are what the console shows.
    """
    trainable = lora_params(info, cfg.lora_rank, cfg.lora_target_modules)
    total, load_peaks = num_params(info), _load_peaks(account)
    model, chosen, cache = built.model, built.chosen, built.cache
    placed, loaded = built.placed, built.loaded
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
        "plan": account.plan.to_dict(),
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


def _load_peaks(account: Account) -> dict[str, float]:
    """Peaks of memory in the load, GiB: of the rank's card and process, and of the whole host."""
    peak = account.peak_of("load") if account.is_cuda else Peak()
    return {
        "device_peak_allocated_gib": peak.allocated_gib,
        "device_peak_reserved_gib": peak.reserved_gib,
        "host_peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "host_peak_used_gib": account.used_gib["load"],
    }


def nbytes(data: Data) -> int:
    """Bytes of tokens that this process holds for itself; mapped files are not counted.

    Args:
        data: of the run.
    """
    arrays = [value for value in vars(data.train.samples.store).values() if hasattr(value, "base")]
    own = [array for array in arrays if not isinstance(array, np.memmap)]
    return sum(array.nbytes for array in own if not isinstance(array.base, np.memmap | mmap.mmap))


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
