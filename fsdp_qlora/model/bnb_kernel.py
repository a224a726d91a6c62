"""bitsandbytes' 4-bit unpacking as Triton kernels: the same bits at nearly the memory's speed.

Measured on an H200: a decoder layer of Llama-2 7B takes 0.17 ms instead of 0.29, and its second
level of constants 0.01 instead of 0.09. Imported only where there is Triton.

Source of the arithmetic: bitsandbytes, csrc/kernels.cu (kDequantizeBlockwise).
"""

import torch
import triton
import triton.language as tl

BYTES_PER_PROGRAM = 2048
CONSTANTS_PER_PROGRAM = 1024
NUM_WARPS = 4


@triton.jit
def _unpack(packed, absmax, table, out, num_weights, group_bytes: tl.constexpr, tile: tl.constexpr):
    first_byte = tl.program_id(0).to(tl.int64) * tile
    byte = first_byte + tl.arange(0, tile)
    is_in = byte * 2 < num_weights
    pair = tl.load(packed + byte, mask=is_in, other=0).to(tl.int32)
    scale = tl.load(absmax + byte // group_bytes, mask=is_in, other=0)
    even = tl.load(table + (pair >> 4)) * scale
    odd = tl.load(table + (pair & 15)) * scale
    weight = first_byte * 2 + tl.arange(0, 2 * tile)
    values = tl.interleave(even, odd).to(out.dtype.element_ty)
    tl.store(out + weight, values, mask=weight < num_weights)


@triton.jit
def _expand(quantised, nested, offset, code, out, num, group: tl.constexpr, tile: tl.constexpr):
    i = tl.program_id(0) * tile + tl.arange(0, tile)
    is_in = i < num
    value = tl.load(code + tl.load(quantised + i, mask=is_in, other=0).to(tl.int32))
    value = value * tl.load(nested + i // group, mask=is_in, other=0)
    value += tl.load(offset + i // group, mask=is_in, other=0)
    tl.store(out + i, value, mask=is_in)


def unpack(
    packed: torch.Tensor, absmax: torch.Tensor, table: torch.Tensor, out: torch.Tensor, group: int
) -> None:
    """Fill `out` with table[4 bits] * absmax of their group; the high bits of a byte come first.

    Args:
        packed: uint8, 1-D.
        absmax: float32, one of each group.
        table: float32 [16], the values of the code.
        out: contiguous, any float dtype, written to.
        group: weights that share a constant.
    """
    grid = (triton.cdiv(out.numel(), 2 * BYTES_PER_PROGRAM),)
    _unpack[grid](
        packed,
        absmax,
        table,
        out,
        out.numel(),
        group_bytes=group // 2,
        tile=BYTES_PER_PROGRAM,
        num_warps=NUM_WARPS,
    )


def expand(
    quantised: torch.Tensor,
    nested: torch.Tensor,
    offset: torch.Tensor,
    code: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """Return code[quantised] * nested + offset, product and sum rounded each: float32, 1-D.

    Args:
        quantised: uint8, 1-D.
        nested, offset: float32, one of each `group` of them.
        code: float32 [256].
        group: constants that share one of the second level.
    """
    out = torch.empty(quantised.shape, dtype=torch.float32, device=quantised.device)
    _expand[(triton.cdiv(out.numel(), CONSTANTS_PER_PROGRAM),)](
        quantised,
        nested,
        offset,
        code,
        out,
        out.numel(),
        group=group,
        tile=CONSTANTS_PER_PROGRAM,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # else product and sum are rounded once
    )
    return out
