"""The command `quantize`: a 4-bit model that transformers loads, in the bytes it would save itself.

Checked before torch is there; the host holds no more than a few tensors at once.
"""

import dataclasses
import math
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fsdp_qlora import arch, atomic, cli
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.cli import flag
from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.export.beside import DTYPES, SHARD_HELP, copy_beside
from fsdp_qlora.export.merge import DEVICES, GIB, ITEM_BYTES

if TYPE_CHECKING:
    import torch

# What stands beside a quantised weight; the last has the code and block size in its name.
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__")
QUANTIZED_BYTES = 0.5 + 4 / 64  # of a weight in 4 bit with its constants, at most
USAGE = """usage: python -m fsdp_qlora quantize --model_name NAME --out DIR [--option ...]

Writes a 4-bit model that transformers loads with bitsandbytes, in the bytes it would save itself.
Tensor by tensor: the host holds no more than a few of them."""


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """Options of `quantize`."""

    model_name: str | None = flag(None, "quantize", "directory or hub name of a 16-bit model")
    out: str | None = flag(None, "quantize", "directory to be made")
    quant_type: str = flag("nf4", "quantize", "4-bit code", ("nf4", "fp4"))
    double_quant: bool = flag(True, "quantize", "quantise the block scales too")
    dtype: str | None = flag(None, "quantize", "of all that stays [as stored]", tuple(DTYPES))
    max_shard_gib: float = flag(5.0, "quantize", SHARD_HELP, rule="> 0")
    device: str = flag("auto", "quantize", "where it is computed", DEVICES)


def main(argv: list[str]) -> int:
    """Write a 4-bit model.

    Args:
        argv: see USAGE.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, no such model (codes 2, 3, 5), a full disk (code 3).
    """
    options = cli.parse(argv, QuantizeOptions, USAGE, ("model_name", "out"))
    info = arch.read(str(options.model_name), need_weights=True)
    if info.stored_format:
        rule = f"is quantized already, as {info.stored_format}"
        raise UserError(str(options.model_name), rule, "take the 16-bit original of this model")
    num_linear = arch.num_linear_params(info)
    num_others = sum(math.prod(ref.shape) for ref in info.tensors.values()) - num_linear
    item_bytes = ITEM_BYTES.get(str(options.dtype), 4)
    need_bytes = round(num_linear * QUANTIZED_BYTES) + num_others * item_bytes
    atomic.check(Path(str(options.out)), need_bytes)
    _run(options, info, need_bytes)
    return DONE


def _run(options: QuantizeOptions, info: ModelInfo, need_bytes: int) -> None:
    """Quantise a model and print what was done."""
    from fsdp_qlora.export.base import choose_device
    from fsdp_qlora.export.shards import Shards

    began_s, device = time.perf_counter(), choose_device(options.device)
    names = [*info.tensors, *(f"{n}.{part}xxx" for n in info.tensors for part in PARTS)]
    out = Path(str(options.out))
    with atomic.new_directory(out, need_bytes) as draft:
        with Shards(draft, names, round(options.max_shard_gib * GIB)) as shards:
            for name, tensor in quantized(options, info, device):
                shards.add(name, tensor)
        copy_beside(draft, info, options.dtype, quantization_config=settings(options, info))
    stored_gib = sum(ref.nbytes for ref in info.tensors.values()) / GIB
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    kind = options.quant_type + (" with double quantisation" if options.double_quant else "")
    print(
        f"written   {out}: {shards.num_files} files, {stored_gib:.2f} -> "
        f"{shards.total_bytes / GIB:.2f} GiB, {kind}, in {time.perf_counter() - began_s:.1f} s; "
        f"at most {peak_gib:.2f} GiB of host memory"
    )
    print(f"load it   AutoModelForCausalLM.from_pretrained({str(out)!r})")


def quantized(
    options: QuantizeOptions, info: ModelInfo, device: "torch.device"
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield the tensors of the 4-bit model; a few are held at once.

    Args:
        options: quant_type, double_quant, dtype.
        info: the 16-bit model.
        device: where it is computed.

    Yields:
        Name and tensor: of a quantised weight its packed bytes, uint8 [weights / 2, 1], then its
        constants as bitsandbytes names them.
    """
    import torch

    from fsdp_qlora.export.base import linear_names
    from fsdp_qlora.model.quantize import GROUP_SIZE, import_bitsandbytes
    from fsdp_qlora.model.weights import Weights

    linears, names = linear_names(info), list(info.tensors)
    bnb = import_bitsandbytes()
    for name, stored in zip(names, Weights(info).read_ahead(names, device), strict=True):
        dtype = stored.dtype if options.dtype is None else getattr(torch, DTYPES[options.dtype])
        weight = stored.to(dtype)
        if name not in linears:
            yield name, weight
            continue
        packed, state = bnb.quantize_4bit(
            weight,
            blocksize=GROUP_SIZE,
            quant_type=options.quant_type,
            compress_statistics=options.double_quant,
            quant_storage=torch.uint8,
        )
        yield name, packed
        for part, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{part}", tensor


def settings(options: QuantizeOptions, info: ModelInfo) -> dict:
    """What config.json must say, in the words of the transformers that is installed.

    Args:
        options: quant_type, double_quant, dtype.
        info: the 16-bit model; its linears have one dtype.

    Returns:
        The value of quantization_config.
    """
    import torch
    from transformers import BitsAndBytesConfig

    from fsdp_qlora.export.base import linear_names
    from fsdp_qlora.model import weights

    stored = {info.tensors[name].dtype for name in linear_names(info)}
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else weights.DTYPES[stored.pop()]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return config.to_dict()
