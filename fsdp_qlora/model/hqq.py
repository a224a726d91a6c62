"""HQQ's unpacking without hqq: bits to values, (value - zero) * scale, by the fastest way there is.

hqq views a weight as a matrix of groups, [groups, group size] (axis 1) or [group size, groups]
(axis 0), and packs the values of rows that lie far apart into one word.

Source: mobiusml/hqq, hqq/core/bitpack.py and quantize.py (Quantizer.dequantize).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

from fsdp_qlora.planning.limits import PER_WORD, Storage


def unpack(
    packed: torch.Tensor,
    constants: Sequence[torch.Tensor],
    shape: Sequence[int],
    dtype: torch.dtype,
    storage: Storage,
) -> torch.Tensor:
    """Unpack one linear to the bits of hqq's own dequantisation.

    As there, difference and product are rounded to the wider one of the compute dtype and the
    dtype of the constants; what is wider than the compute dtype is then rounded to it.

    Args:
        packed: uint8, 1-D.
        constants: zero and scale of each group, as stored.
        shape: (O, I).
        dtype: of the result.
        storage: bits, group size and axis.

    Returns:
        weight_OI.
    """
    zero, scale = constants
    cols = storage.group_size if storage.axis else math.prod(shape) // storage.group_size
    rows = math.prod(shape) // cols
    words = packed.view(torch.int32 if storage.weight_bits == 3 else torch.uint8).view(-1, cols)
    math_dtype = torch.promote_types(dtype, zero.dtype)
    kernel = triton_kernel("hqq_kernel") if packed.is_cuda else None
    if kernel is not None:
        out = torch.empty(rows, cols, dtype=dtype, device=packed.device)
        kernel.unpack(words, zero, scale, out, storage.weight_bits, storage.axis, math_dtype)
        return out.view(*shape)
    zero, scale = (part.unsqueeze(storage.axis) for part in constants)
    values = _values(words, storage.weight_bits, math_dtype)[:rows]
    return values.sub_(zero).mul_(scale).view(*shape).to(dtype)


def _values(words: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    num_slots = PER_WORD if bits == 3 else 8 // bits
    values = torch.empty((num_slots, *words.shape), dtype=dtype, device=words.device)
    for slot, part in enumerate(values):
        part.copy_((words >> bits * (num_slots - 1 - slot)).bitwise_and_((1 << bits) - 1))
    return values.flatten(0, 1)


@lru_cache
def triton_kernel(name: str) -> ModuleType | None:
    """A module beside this one that needs Triton; None where torch came without Triton."""
    try:
        return import_module(f"fsdp_qlora.model.{name}")
    except ImportError:
        return None
