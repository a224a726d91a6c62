"""e4m3 codes of 4-bit weights and of activations as Triton kernels: each byte is read once.

Tiles are fixed, not tuned while a run goes on: resumed runs compute the same bits. matmul.py has
the same in plain PyTorch, whose casts and divisions round as these do.
"""

import torch
import triton
import triton.language as tl

BYTES_PER_PROGRAM = 2048
TURNED_ROWS = 256
NUM_WARPS = 4
LARGEST, FLOOR = tl.constexpr(448.0), tl.constexpr(1e-30)


@triton.jit
def _weight_rows(
    codes, absmax, table, scales, out, num_bytes, group_bytes: tl.constexpr, tile: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * tile + tl.arange(0, tile)
    is_in = byte < num_bytes
    pair = tl.load(codes + row * num_bytes + byte, mask=is_in, other=0).to(tl.int32)
    at = absmax + row * (num_bytes // group_bytes)
    factor = tl.load(at + byte // group_bytes, mask=is_in, other=0)
    factor = factor * tl.math.div_rn(1.0, tl.load(scales + row))
    even = tl.load(table + (pair >> 4)) * factor
    odd = tl.load(table + (pair & 15)) * factor
    values = tl.interleave(even, odd).to(out.dtype.element_ty)
    col = tl.program_id(1) * (2 * tile) + tl.arange(0, 2 * tile)
    tl.store(out + row * (2 * num_bytes) + col, values, mask=col < 2 * num_bytes)


@triton.jit
def _weight_turned(
    codes,
    absmax,
    table,
    scales,
    out,
    num_out,
    num_bytes,
    group_bytes: tl.constexpr,
    tile: tl.constexpr,
):
    """One group of columns of `tile` rows: its bytes are turned before they become values."""
    group = tl.program_id(1)
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    byte = tl.arange(0, group_bytes)
    is_row = row < num_out
    start = codes + group * group_bytes + tl.program_id(0).to(tl.int64) * tile * num_bytes
    places = tl.arange(0, tile)[:, None] * num_bytes + byte[None, :]
    pair = tl.trans(tl.load(start + places, mask=is_row[:, None], other=0)).to(tl.int32)
    at = row.to(tl.int64) * (num_bytes // group_bytes) + group
    factor = tl.load(absmax + at, mask=is_row, other=0)
    factor = factor * tl.math.div_rn(1.0, tl.load(scales + row, mask=is_row, other=1.0))
    even = (tl.load(table + (pair >> 4)) * factor[None, :]).to(out.dtype.element_ty)
    odd = (tl.load(table + (pair & 15)) * factor[None, :]).to(out.dtype.element_ty)
    first = out + group.to(tl.int64) * (2 * group_bytes) * num_out
    places = byte[:, None] * (2 * num_out) + row[None, :]
    tl.store(first + places, even, mask=is_row[None, :])
    tl.store(first + num_out + places, odd, mask=is_row[None, :])


def weight_codes(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    table: torch.Tensor,
    scales_O: torch.Tensor,
    out: torch.Tensor,
    is_turned: bool,
    group: int,
) -> None:
    """Fill `out` with table[4 bits] * (absmax / scale of the row).

    Args:
        codes, absmax, table, scales_O: see matmul.Quantized4.
        out: [O, I], or [I, O] if turned, written to.
        is_turned: see out.
        group: weights that share a constant.
    """
    num_out, num_bytes = scales_O.numel(), codes.numel() // scales_O.numel()
    tensors, meta = (codes, absmax, table, scales_O, out), {"group_bytes": group // 2}
    if is_turned:
        grid = (triton.cdiv(num_out, TURNED_ROWS), 2 * num_bytes // group)
        _weight_turned[grid](
            *tensors, num_out, num_bytes, tile=TURNED_ROWS, num_warps=NUM_WARPS, **meta
        )
        return
    grid = (num_out, triton.cdiv(num_bytes, BYTES_PER_PROGRAM))
    _weight_rows[grid](*tensors, num_bytes, tile=BYTES_PER_PROGRAM, num_warps=NUM_WARPS, **meta)


@triton.jit
def _quantize_rows(
    x, factors, codes, scales, num, stride, has_factors: tl.constexpr, tile: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, tile)
    is_in = col < num
    values = tl.load(x + row * stride + col, mask=is_in, other=0).to(tl.float32)
    rest = tl.sum(values - values, 0)  # not finite where one of them is not
    if has_factors:
        values = values * tl.load(factors + col, mask=is_in, other=0)
    most = tl.maximum(tl.max(tl.abs(values), 0), FLOOR) + rest
    quotient = values * tl.math.div_rn(LARGEST, most)
    quotient = tl.minimum(tl.maximum(quotient, -LARGEST), LARGEST)
    tl.store(codes + row * num + col, quotient.to(codes.dtype.element_ty), mask=is_in)
    tl.store(scales + row, tl.math.div_rn(most, LARGEST))


def quantize_rows(
    x_MI: torch.Tensor, factors_I: torch.Tensor | None, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """See matmul.quantize_rows.

    Args:
        x_MI: rows contiguous.
        factors_I: float32, or None.
        dtype: of the codes.
    """
    num, tile = x_MI.shape[1], triton.next_power_of_2(x_MI.shape[1])
    codes = torch.empty(x_MI.shape, dtype=dtype, device=x_MI.device)
    scales = torch.empty(len(x_MI), 1, dtype=torch.float32, device=x_MI.device)
    factors = scales if factors_I is None else factors_I
    meta = {"tile": tile, "num_warps": min(16, max(4, tile // 1024))}
    tensors = x_MI, factors, codes, scales
    _quantize_rows[(len(x_MI),)](
        *tensors, num, x_MI.stride(0), has_factors=factors_I is not None, **meta
    )
    return codes, scales
