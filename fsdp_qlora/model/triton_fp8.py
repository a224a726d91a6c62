"""e4m3 codes of 4-bit weights and of activations as Triton kernels: each byte is read once.

Tiles are fixed, not tuned while a run goes on: resumed runs compute the same bits. matmul.py has the
same in plain PyTorch, whose casts and divisions round as these do.
"""

import torch
import triton
import triton.language as tl

TILE_O, TILE_I = 128, 128
NUM_WARPS = 8
LARGEST, FLOOR = tl.constexpr(448.0), tl.constexpr(1e-30)


@triton.jit
def _weight_codes(
    quantized,
    absmax,
    table,
    scales,
    out,
    num_out,
    num_in,
    stride,
    is_turned: tl.constexpr,
    group: tl.constexpr,
    tile_o: tl.constexpr,
    tile_i: tl.constexpr,
):
    row = tl.program_id(0) * tile_o + tl.arange(0, tile_o)
    byte = tl.program_id(1) * (tile_i // 2) + tl.arange(0, tile_i // 2)
    is_row = row < num_out
    is_in = is_row[:, None] & (byte < num_in // 2)[None, :]
    start = row.to(tl.int64) * (num_in // 2)
    pair = tl.load(quantized + start[:, None] + byte[None, :], mask=is_in, other=0).to(tl.int32)
    at = row.to(tl.int64)[:, None] * (num_in // group) + (byte // (group // 2))[None, :]
    scale = tl.load(absmax + at, mask=is_in, other=0)
    inverse = tl.math.div_rn(1.0, tl.load(scales + row, mask=is_row, other=1.0))
    even = tl.load(table + (pair >> 4)) * scale * inverse[:, None]
    odd = tl.load(table + (pair & 15)) * scale * inverse[:, None]
    codes = tl.interleave(even, odd).to(out.dtype.element_ty)
    col = tl.program_id(1) * tile_i + tl.arange(0, tile_i)
    if is_turned:
        place = col.to(tl.int64)[:, None] * stride + row[None, :]
        tl.store(out + place, tl.trans(codes), mask=(col < num_in)[:, None] & is_row[None, :])
    else:
        place = row.to(tl.int64)[:, None] * stride + col[None, :]
        tl.store(out + place, codes, mask=is_row[:, None] & (col < num_in)[None, :])


def weight_codes(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    scales_O: torch.Tensor,
    out: torch.Tensor,
    is_turned: bool,
    group: int,
) -> None:
    """Fill `out` with e4m3(table[4 bits] * absmax / scale of the row).

    Args:
        codes, absmax, table: see matmul.Quantized4.
        scales_O: float32.
        out: [O, I], or [I, O] if turned; rows contiguous, written to.
        is_turned: see out.
        group: weights that share a constant.
    """
    num_out, num_in = out.shape[::-1] if is_turned else out.shape
    grid = (triton.cdiv(num_out, TILE_O), triton.cdiv(num_in, TILE_I))
    sizes, meta = (num_out, num_in, out.stride(0)), {"tile_o": TILE_O, "tile_i": TILE_I}
    _weight_codes[grid](
        *(codes, absmax, table, scales_O, out, *sizes),
        is_turned=is_turned,
        group=group,
        num_warps=NUM_WARPS,
        **meta,
    )


@triton.jit
def _quantize_rows(x, factors, codes, scales, num, stride, has_factors: tl.constexpr, tile: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, tile)
    is_in = col < num
    values = tl.load(x + row * stride + col, mask=is_in, other=0).to(tl.float32)
    if has_factors:
        values = values * tl.load(factors + col, mask=is_in, other=0)
    most = tl.maximum(tl.max(tl.abs(values), 0), FLOOR) + tl.sum(values - values, 0)
    quotient = values * tl.math.div_rn(LARGEST, most)
    quotient = tl.minimum(tl.maximum(quotient, -LARGEST), LARGEST)
    tl.store(codes + row * num + col, quotient.to(codes.dtype.element_ty), mask=is_in)
    tl.store(scales + row, tl.math.div_rn(most, LARGEST))


def quantize_rows(
    x_MI: torch.Tensor, factors_I: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See matmul.quantize_rows.

    Args:
        x_MI: rows contiguous.
        factors_I: float32, or None.
    """
    num, tile = x_MI.shape[1], triton.next_power_of_2(x_MI.shape[1])
    codes = torch.empty(x_MI.shape, dtype=torch.float8_e4m3fn, device=x_MI.device)
    scales = torch.empty(len(x_MI), 1, dtype=torch.float32, device=x_MI.device)
    factors = scales if factors_I is None else factors_I
    meta = {"tile": tile, "num_warps": min(16, max(4, tile // 1024))}
    tensors = x_MI, factors, codes, scales
    _quantize_rows[(len(x_MI),)](
        *tensors, num, x_MI.stride(0), has_factors=factors_I is not None, **meta
    )
    return codes, scales
