"""The command `merge`: a LoRA adapter added to its base, tensor by tensor, and compared with it.

Checked before torch is there. Shape letters: I in features, O out features, R LoRA rank.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora import arch, atomic, cli
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import read_tensors
from fsdp_qlora.cli import flag
from fsdp_qlora.config import TEXT
from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.export import adapter as adapters
from fsdp_qlora.export.adapter import SavedAdapter
from fsdp_qlora.export.model_files import (
    DEVICES,
    DTYPES,
    GIB,
    ITEM_BYTES,
    SHARD_HELP,
    choose_device,
    copy_beside,
    describe_written,
    write_weights,
)

if TYPE_CHECKING:
    from fsdp_qlora.export.merge_weights import TrainedBase

FORMATS = ("nf4", "nf4_dq", "fp4", "fp4_dq", "int8", "hqq2", "hqq3", "hqq4", "hqq8", "bf16")
BASE_HELP = "what the adapter is added to; auto: what training saw, if the adapter tells"
CHECK_HELP = "rows on which base + adapter and the result are compared; 0: none"
CACHE_HELP = "where training kept its 4-bit bytes"
DEFAULT_COMPUTE = "bfloat16"
USAGE = """usage: python -m fsdp_qlora merge --adapter DIR --out DIR [--option value ...]

Adds a LoRA adapter to its base, tensor by tensor, and writes a plain model that transformers and
llama.cpp's converter read. `--base dequantized` adds it to the 4-bit base as training saw it,
`16bit` to the original weights. The merge check measures how far the result is from base + adapter
as trained; it is printed and kept in merge.json."""


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Options of `merge`."""

    adapter: str | None = flag(None, "merge", "directory of the adapter")
    out: str | None = flag(None, "merge", "directory to be made")
    model_name: str | None = flag(None, "merge", "its base [as adapter_config.json has it]")
    base: str = flag("auto", "merge", BASE_HELP, ("auto", "16bit", "dequantized"))
    format: str | None = flag(None, "merge", "of that base, where nothing tells", FORMATS)
    quant_cache: str = flag("auto", "merge", CACHE_HELP, rule=TEXT)
    any_base: bool = flag(False, "merge", "take another base than the one it was trained on")
    dtype: str = flag("bf16", "merge", "of the weights that are written", tuple(DTYPES))
    max_shard_gib: float = flag(5.0, "merge", SHARD_HELP, rule="> 0")
    device: str = flag("auto", "merge", "where it is computed", DEVICES)

    evidence_rows: int = flag(8, "merge check", CHECK_HELP, rule=">= 0")
    evidence_tokens: int = flag(64, "merge check", "longest such row in tokens", rule=">= 2")
    dataset: str | None = flag(None, "merge check", "where they come from [that of the run]")


def main(argv: list[str]) -> int:
    """Merge an adapter into its base.

    Args:
        argv: see USAGE.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, an adapter or a base that does not fit (codes 2, 5), a full
            disk (code 3), values that the dtype cannot hold (code 5).
    """
    options = cli.parse(argv, MergeOptions, USAGE, ("adapter", "out"))
    adapter = adapters.read(Path(str(options.adapter)).expanduser())
    if not (options.model_name or adapter.base_name):
        got = f"{adapter.path}: base_model_name_or_path"
        raise UserError(got, "is empty", "name the base with --model_name")
    info = arch.read(options.model_name or adapter.base_name, need_weights=True)
    adapters.check(adapter, info)
    num_weights = sum(math.prod(ref.shape) for ref in info.tensors.values())
    need_bytes = num_weights * ITEM_BYTES[options.dtype]
    atomic.check(Path(str(options.out)), need_bytes)
    _run(options, adapter, info, need_bytes)
    return DONE


def _run(options: MergeOptions, adapter: SavedAdapter, info: ModelInfo, need_bytes: int) -> None:
    """Merge, compare, and print what was done."""
    from fsdp_qlora.export import merge_weights
    from fsdp_qlora.hardware import versions

    device = choose_device(options.device)
    digest = _check_base(options, adapter, info)
    seen = _trained_base(options, adapter, info)
    is_dequantized = _is_dequantized(options.base, seen)
    added_to = seen if is_dequantized else merge_weights.TrainedBase(info, None, seen.dtype, "off")
    four_bit = f"{seen.format_name} dequantized, as training saw it, {seen.note}"
    print(f"adapter   {adapter.path}: {adapter}")
    print(
        f"base      {info.path}: {four_bit if is_dequantized else 'its 16-bit weights'}", flush=True
    )
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
        "versions": versions(device),
    }
    out, max_bytes = Path(str(options.out)), round(options.max_shard_gib * GIB)
    with atomic.new_directory(out, need_bytes) as draft:
        tensors = merge_weights.merged(info, adapter, added_to, options.dtype, device)
        written = write_weights(draft, info.tensors, tensors, max_bytes)
        copy_beside(draft, info, options.dtype, adapter.path)
        facts |= written
        result = dataclasses.replace(info, tensors=read_tensors(draft), quantized={})
        facts["evidence"] = merge_weights.check(options, adapter, info, seen, result, device)
        atomic.write_json(draft / "merge.json", facts)
    print("\n".join([describe_written(out, written), *merge_weights.lines(facts["evidence"])]))


def _check_base(options: MergeOptions, adapter: SavedAdapter, info: ModelInfo) -> str | None:
    """Refuse another base than the one the adapter was trained on, where it tells."""
    trained_on, digest = adapter.record.get("digest"), adapters.digest(info)
    if trained_on is not None and digest != trained_on and not options.any_base:
        rule = f"is not the base that {adapter.path} was trained on ({adapter.record.get('base')})"
        remedy = "give that one with --model_name, or add --any_base true"
        raise UserError(str(info.path), rule, remedy)
    return digest


def _trained_base(options: MergeOptions, adapter: SavedAdapter, info: ModelInfo) -> "TrainedBase":
    """What the linears of the base were in training."""
    import torch

    from fsdp_qlora.export.merge_weights import TrainedBase
    from fsdp_qlora.model.quantize import FORMATS

    name = options.format or adapter.record.get("format")
    compute = str(adapter.record.get("compute_dtype") or DEFAULT_COMPUTE)
    if name is not None and name not in FORMATS:
        remedy = f"name one with --format: {' '.join(FORMATS)}"
        raise UserError(f"{adapter.path}: format {name!r}", "is unknown", remedy)
    return TrainedBase(info, name, getattr(torch, compute), options.quant_cache)


def _is_dequantized(base: str, seen: "TrainedBase") -> bool:
    if base == "dequantized" and seen.format_name is None:
        rule = "the adapter does not tell what its base was quantized to"
        raise UserError("--base dequantized", rule, f"add --format: {' '.join(FORMATS)}")
    is_four_bit = seen.format_name not in (None, "bf16")
    return base == "dequantized" or (base == "auto" and is_four_bit)
