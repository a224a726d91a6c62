"""A LoRA adapter added to its base, tensor by tensor, and what that changes, measured.

Shape letters: I in features, O out features, R LoRA rank.
"""

import dataclasses
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import read_tensors
from fsdp_qlora.atomic import new_directory, write_json
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.hardware import versions
from fsdp_qlora.model.quantize import FORMATS
from fsdp_qlora.model.weights import Weights
from fsdp_qlora.results import adapter_files, base_weights, evidence
from fsdp_qlora.results.adapter_files import Adapter
from fsdp_qlora.results.base_weights import AsTrained
from fsdp_qlora.results.beside import DTYPES, copy_beside
from fsdp_qlora.results.shards import Shards
from fsdp_qlora.results.verbs import MergeOptions

GIB = 2**30
DEFAULT_COMPUTE = "bfloat16"


def run(options: MergeOptions, adapter: Adapter, info: ModelInfo, need_bytes: int) -> None:
    """Merge, compare, and say what was done.

    Args:
        options: of the command line.
        adapter: to be merged; it belongs to `info`.
        info: the base, with its tensors.
        need_bytes: of the result.

    Raises:
        UserError: another base, an unknown format (code 2), values that the dtype cannot hold
            (code 5), a full disk (code 3).
    """
    began_s, device = time.perf_counter(), base_weights.choose_device(options.device)
    digest = _check_base(options, adapter, info)
    seen = _as_trained(options, adapter, info)
    is_dequantized = _is_dequantized(options.base, seen)
    added_to = seen if is_dequantized else AsTrained(info, None, seen.dtype, "off")
    four_bit = f"{seen.format_name} dequantized, as training saw it, {seen.note}"
    kind = four_bit if is_dequantized else "its 16-bit weights"
    print(f"adapter   {adapter.path}: {_describe(adapter)}")
    print(f"base      {info.path}: {kind}", flush=True)
    facts: dict[str, Any] = {
        "adapter": str(adapter.path),
        "base": str(info.path),
        "base_digest": digest,
        "added_to": "dequantized" if is_dequantized else "16bit",
        "trained_over": seen.format_name,
        "packed_bytes": seen.note,
        "dtype": options.dtype,
        "num_merged": len(adapter.pairs),
        "num_replaced": len(adapter.replaced),
        "device": device.type,
    }
    out = Path(str(options.out))
    with new_directory(out, need_bytes) as draft:
        tensors = merged(info, adapter, added_to, DTYPES[options.dtype], device)
        with Shards(draft, info.tensors, round(options.max_shard_gib * GIB)) as shards:
            for name, tensor in tensors:
                shards.add(name, tensor)
        copy_beside(draft, info, options.dtype, adapter.path)
        facts |= {
            "num_files": shards.num_files,
            "gib": shards.total_bytes / GIB,
            "written_s": time.perf_counter() - began_s,
            "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        result = dataclasses.replace(info, tensors=read_tensors(draft), quantized={})
        facts["evidence"] = evidence.collect(options, adapter, info, seen, result, device)
        facts["versions"] = versions(device)
        write_json(draft / "merge.json", facts)
    print(
        f"written   {out}: {facts['num_files']} files, {facts['gib']:.2f} GiB {options.dtype} in "
        f"{facts['written_s']:.1f} s; at most {facts['host_peak_gib']:.2f} GiB of host memory"
    )
    print("\n".join(evidence.lines(facts["evidence"])))


def _describe(adapter: Adapter) -> str:
    ranks = ", ".join(map(str, adapter.ranks))
    parts = [f"rank {ranks} on {len(adapter.pairs)} linears"] * bool(adapter.pairs)
    return ", ".join(parts + [f"{len(adapter.replaced)} whole tensors"] * bool(adapter.replaced))


def merged(
    info: ModelInfo, adapter: Adapter, rounding: AsTrained, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of base + adapter; a few are held at once.

    Args:
        info: the base.
        adapter: added to it.
        rounding: what the adapter is added to.
        dtype: of the results.
        device: where it is computed.

    Yields:
        Name and tensor, in the order of the base's files.

    Raises:
        UserError: a result is not finite (code 5).
    """
    kept = [name for name in info.tensors if name not in adapter.replaced]
    read = Weights(info).read_ahead(list(filter(rounding.needs, kept)), device)
    for name in info.tensors:
        if name in adapter.replaced:
            weight = base_weights.load(adapter.replaced[name], device)
        else:
            weight = rounding(name, next(read) if rounding.needs(name) else None, device)
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        if pair is not None:
            weight = base_weights.add_pair(weight, pair, device)
        result = weight.to(dtype)
        if not result.sum(dtype=torch.float32).isfinite():
            remedy = "use --dtype bf16" if dtype == torch.float16 else "check base and adapter"
            raise UserError(name, f"is not finite in {dtype}", remedy, INTEGRITY)
        yield name, result


def _check_base(options: MergeOptions, adapter: Adapter, info: ModelInfo) -> str | None:
    """Refuse another base than the one the adapter was trained on, where it tells."""
    trained_on, found = adapter.record.get("digest"), adapter_files.digest(info)
    if trained_on is not None and found != trained_on and not options.any_base:
        rule = f"is not the base that {adapter.path} was trained on ({adapter.record.get('base')})"
        remedy = "give that one with --model_name, or add --any_base true"
        raise UserError(str(info.path), rule, remedy)
    return found


def _as_trained(options: MergeOptions, adapter: Adapter, info: ModelInfo) -> AsTrained:
    """What the linears of the base were in training."""
    name = options.format or adapter.record.get("format")
    compute = str(adapter.record.get("compute_dtype") or DEFAULT_COMPUTE)
    if name is not None and name not in FORMATS:
        remedy = f"name one with --format: {' '.join(FORMATS)}"
        raise UserError(f"{adapter.path}: format {name!r}", "is unknown", remedy)
    return AsTrained(info, name, getattr(torch, compute), options.quant_cache)


def _is_dequantized(base: str, seen: AsTrained) -> bool:
    if base == "dequantized" and seen.format_name is None:
        rule = "the adapter does not tell what its base was quantised to"
        raise UserError("--base dequantized", rule, f"add --format: {' '.join(FORMATS)}")
    is_four_bit = seen.format_name not in (None, "bf16")
    return base == "dequantized" or (base == "auto" and is_four_bit)
