"""4-bit weights to 16 bit as Triton kernels: the libraries' own bits at nearly the memory's speed.

bitsandbytes, measured on an H200: a decoder layer of Llama-2 7B takes 0.17 ms instead of 0.29, and
its second level of constants 0.01 instead of 0.09. HQQ: bits, zero, scale and rounding in one pass;
each word is read once and all its values written; nothing but the result is allocated. The matrix
of groups is [rows, cols], one group a row (axis 1) or a column (axis 0); word [r, c] of
[word_rows, cols] holds the values [r + slot * word_rows, c], the first slot in its highest bits.

Imported only where there is Triton; quantize.py has the same in plain PyTorch.

Source of the arithmetic: bitsandbytes, csrc/kernels.cu (kDequantizeBlockwise).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fsdp_qlora.arch.files import GROUP

BYTES_PER_PROGRAM = 2048
CONSTANTS_PER_PROGRAM = 1024
NUM_WARPS = 4


def _power_of_2(num: int) -> int:
    return 1 << (num - 1).bit_length()  # Triton's own takes the host as long as a fifth of a launch


@triton.jit
def _dequantize_bnb(
    quantized, absmax, table, out, num, stride, group_bytes: tl.constexpr, tile: tl.constexpr
):
    part = tl.program_id(1).to(tl.int64)
    quantized += part * (num // 2)
    absmax += part * (num // (2 * group_bytes))
    out += part * stride
    first_byte = tl.program_id(0).to(tl.int64) * tile
    byte = first_byte + tl.arange(0, tile)
    is_in = byte * 2 < num
    pair = tl.load(quantized + byte, mask=is_in, other=0).to(tl.int32)
    scale = tl.load(absmax + byte // group_bytes, mask=is_in, other=0)
    first, second = pair >> 4, pair & 15
    if absmax.dtype.element_ty == tl.uint8:  # the exponent of a power of two; low bits come first
        exponent = scale.to(tl.int32)
        scale = tl.where(exponent > 0, exponent << 23, 1 << 22).to(tl.float32, bitcast=True)
        first, second = second, first
    even = tl.load(table + first) * scale
    odd = tl.load(table + second) * scale
    weight = first_byte * 2 + tl.arange(0, 2 * tile)
    values = tl.interleave(even, odd).to(out.dtype.element_ty)
    tl.store(out + weight, values, mask=weight < num)


@triton.jit
def _expand(quantized, nested, offset, code, out, num, group: tl.constexpr, tile: tl.constexpr):
    i = tl.program_id(0) * tile + tl.arange(0, tile)
    is_in = i < num
    value = tl.load(code + tl.load(quantized + i, mask=is_in, other=0).to(tl.int32))
    value = value * tl.load(nested + i // group, mask=is_in, other=0)
    value += tl.load(offset + i // group, mask=is_in, other=0)
    tl.store(out + i, value, mask=is_in)


def dequantize_bnb(
    quantized: Tensor, absmax: Tensor, table: Tensor, out: Tensor, group: int
) -> Tensor:
    """Return `out`, filled with table[4 bits] * absmax; the high bits of a byte come first.

    Args:
        quantized: uint8, 1-D.
        absmax: float32, one of each group; or, of MXFP4, whose low bits come first, uint8: powers
            of two, as a float32 has them.
        table: float32 [16], the values of the code.
        out: any float dtype, written to; contiguous, or, in three dimensions, its parts are.
        group: weights that share a constant.
    """
    num, stride = (out.shape[0], out.stride(0)) if out.dim() == 3 else (1, 0)
    size = out.numel() // num
    grid = (-(-size // (2 * BYTES_PER_PROGRAM)), num)
    meta = {"group_bytes": group // 2, "tile": BYTES_PER_PROGRAM, "num_warps": NUM_WARPS}
    _dequantize_bnb[grid](quantized, absmax, table, out, size, stride, **meta)
    return out


def expand(quantized: Tensor, nested: Tensor, offset: Tensor, code: Tensor, group: int) -> Tensor:
    """Return code[quantized] * nested + offset, product and sum rounded each: float32, 1-D.

    Args:
        quantized: uint8, 1-D.
        nested, offset: float32, one of each `group` of them.
        code: float32 [256].
        group: constants that share one of the second level.
    """
    out = torch.empty(quantized.shape, dtype=torch.float32, device=quantized.device)
    meta = {"tile": CONSTANTS_PER_PROGRAM, "num_warps": NUM_WARPS, "group": group}
    meta["enable_fp_fusion"] = False  # else product and sum are rounded once
    grid = (-(-out.numel() // CONSTANTS_PER_PROGRAM),)
    _expand[grid](quantized, nested, offset, code, out, out.numel(), **meta)
    return out


TILE = 2048  # words of one program: a few wide loads and stores for each of its threads
COLS_AT_AXIS_0 = 256
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _dequantize_hqq(
    words,
    zeros,
    scales,
    out,
    rows,
    cols,
    word_rows,
    tiles_across,
    bits: tl.constexpr,
    slots: tl.constexpr,
    axis: tl.constexpr,
    math_dtype: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_cols: tl.constexpr,
):
    tile = tl.program_id(0)
    r = (tile // tiles_across) * tile_rows + tl.arange(0, tile_rows)[:, None]
    c = (tile % tiles_across) * tile_cols + tl.arange(0, tile_cols)[None, :]
    is_word = (r < word_rows) & (c < cols)
    word = tl.load(words + r * cols + c, mask=is_word, other=0).to(tl.int32)
    if axis == 0:
        zero = tl.load(zeros + c, mask=c < cols, other=0).to(tl.float32)
        scale = tl.load(scales + c, mask=c < cols, other=0).to(tl.float32)
    for slot in tl.static_range(slots):
        row = r + slot * word_rows
        if axis == 1:
            zero = tl.load(zeros + row, mask=row < rows, other=0).to(tl.float32)
            scale = tl.load(scales + row, mask=row < rows, other=0).to(tl.float32)
        value = ((word >> (bits * (slots - 1 - slot))) & ((1 << bits) - 1)).to(tl.float32)
        # Each step is rounded as torch rounds it in that dtype.
        value = (value - zero).to(math_dtype).to(tl.float32)
        value = (value * scale).to(math_dtype).to(out.dtype.element_ty)
        tl.store(out + row * cols + c, value, mask=is_word & (row < rows))


def dequantize_hqq(
    words: Tensor,
    zero: Tensor,
    scale: Tensor,
    out: Tensor,
    bits: int,
    axis: int,
    math_dtype: torch.dtype,
) -> None:
    """Fill `out` with (values - zero) * scale.

    Args:
        words: uint8, or int32 for 3 bits, [word_rows, cols].
        zero, scale: one of each group, 1-D.
        out: [rows, cols], any float dtype, written to.
        bits, axis: of the format.
        math_dtype: in which difference and product are rounded.
    """
    (rows, cols), word_rows = out.shape, words.shape[0]
    assert out.numel() + cols * 32 < 2**31, "indices are 32 bit"
    tile_cols = COLS_AT_AXIS_0 if axis == 0 else cols
    tiles_across, tile_rows = -(-cols // tile_cols), TILE // tile_cols
    meta = {"bits": bits, "slots": 10 if bits == 3 else 8 // bits, "axis": axis}
    meta |= {"tile_rows": tile_rows, "tile_cols": tile_cols, "num_warps": NUM_WARPS}
    meta["math_dtype"] = TL_DTYPES[math_dtype]
    grid = (-(-word_rows // tile_rows) * tiles_across,)
    _dequantize_hqq[grid](words, zero, scale, out, rows, cols, word_rows, tiles_across, **meta)


@triton.jit
def _add_low_rank(acc, low, high, row, col, is_row, n, turned, rank, rank_tile, first=0):
    r = first + tl.arange(0, rank_tile)
    left = tl.load(
        low + row[:, None] * rank + r[None, :],
        mask=is_row[:, None] & (r < rank)[None, :],
        other=0.0,
    )
    at = r[:, None] * n + col[None, :] if turned else col[None, :] * rank + r[:, None]
    is_in = (r < rank)[:, None] & (col < n)[None, :]
    right = tl.load(high + at, mask=is_in, other=0.0)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["first", "last"])
def _grouped_matmul(
    x,
    weight,
    out,
    bias,
    low,
    high,
    tile_expert,
    tile_row,
    stops,
    source,
    target,
    alpha,
    first,
    last,
    n,
    k,
    turned: tl.constexpr,
    rank: tl.constexpr,
    rank_tile: tl.constexpr,
    is_even: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
):
    across = tl.cdiv(n, tile_n)
    tile = tl.program_id(0) // across
    expert = tl.load(tile_expert + tile)
    if (expert < first) | (expert >= last):
        return
    row = tl.load(tile_row + tile) + tl.arange(0, tile_m)
    is_row = row < tl.load(stops + expert)
    col, at_k = (tl.program_id(0) % across) * tile_n + tl.arange(0, tile_n), tl.arange(0, tile_k)
    row = row.to(tl.int64)
    x_row = row if source is None else tl.load(source + row, mask=is_row, other=0)
    x_at = x + x_row[:, None] * k + at_k[None, :]
    weight += (expert - first).to(tl.int64) * n * k
    weight_at = weight + (
        at_k[:, None] * n + col[None, :] if turned else at_k[:, None] + col[None, :] * k
    )
    acc = tl.zeros((tile_m, tile_n), dtype=tl.float32)
    for start in range(0, k, tile_k):
        is_k = at_k < (tile_k if is_even else k - start)
        left = tl.load(x_at, mask=is_row[:, None] & is_k[None, :], other=0.0)
        right = tl.load(weight_at, mask=is_k[:, None] & (col < n)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_at += tile_k
        weight_at += tile_k * n if turned else tile_k
    acc *= alpha
    if low is not None:
        high += expert.to(tl.int64) * (n * rank)
        acc = _add_low_rank(acc, low, high, row, col, is_row, n, turned, rank, rank_tile)
    if bias is not None:
        acc += tl.load(bias + expert * n + col, mask=col < n, other=0.0).to(tl.float32)[None, :]
    out_row = row if target is None else tl.load(target + row, mask=is_row, other=0)
    at = out + out_row[:, None] * n + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=is_row[:, None] & (col < n)[None, :])


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    tiles: tuple[Tensor, Tensor, Tensor, int],
    experts: tuple[int, int],
    turned: bool = False,
    alpha: float = 1.0,
    source: Tensor | None = None,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
) -> None:
    """Fill the rows of some experts: out = alpha * x @ W^T + low @ high^T + bias, of their expert.

    Args:
        x: [rows, K].
        weight: [experts here, N, K], or, turned, [experts here, K, N].
        out: [rows, N], written to.
        tiles: of each tile of rows, expert and first row; where each expert's rows end; rows of a
            tile.
        experts: first and last + 1 of those in `weight`.
        turned: see `weight`.
        alpha: see above.
        source: row of `x` of each row, or None.
        target: row of `out` of each row, or None.
        bias: [all experts, N], or None.
        low: [rows, R], or None.
        high: [all experts, N, R], or, turned, [all experts, R, N].
    """
    n, k, rank = out.shape[1], x.shape[1], 0 if low is None else low.shape[1]
    is_wide = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    tile_n = 16 if n <= 16 else 256 if is_wide and n >= 256 else 128
    tile_k = 32 if x.dtype == torch.float32 else 64
    meta = {"tile_m": tiles[3], "tile_n": tile_n, "tile_k": tile_k, "is_even": k % tile_k == 0}
    meta |= {"rank": rank, "rank_tile": max(16, _power_of_2(rank)), "turned": turned}
    meta |= {"num_warps": 4 if tile_n == 16 else 8, "num_stages": 3}
    grid = (tiles[0].numel() * -(-n // tile_n),)
    tensors = x, weight, out, bias, low, high, *tiles[:3], source, target
    _grouped_matmul[grid](*tensors, alpha, *experts, n, k, **meta)


@triton.jit
def _grouped_outer(
    low,
    x,
    out,
    starts,
    source,
    n,
    rank: tl.constexpr,
    rank_tile: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
):
    expert, r = tl.program_id(0), tl.arange(0, rank_tile)
    col = tl.program_id(1) * tile_n + tl.arange(0, tile_n)
    start, stop = tl.load(starts + expert), tl.load(starts + expert + 1)
    acc = tl.zeros((rank_tile, tile_n), dtype=tl.float32)
    for first in range(start, stop, tile_m):
        row = (first + tl.arange(0, tile_m)).to(tl.int64)
        is_row = row < stop
        low_at = low + row[None, :] * rank + r[:, None]
        left = tl.load(low_at, mask=is_row[None, :] & (r < rank)[:, None], other=0.0)
        x_row = row if source is None else tl.load(source + row, mask=is_row, other=0)
        x_at = x + x_row[:, None] * n + col[None, :]
        right = tl.load(x_at, mask=is_row[:, None] & (col < n)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
    at = r[:, None] * n + col[None, :]
    value = acc.to(out.dtype.element_ty)
    is_in = (r < rank)[:, None] & (col < n)[None, :]
    tl.store(out + expert.to(tl.int64) * (n * rank) + at, value, mask=is_in)


def grouped_outer(
    low: Tensor, x: Tensor, out: Tensor, starts: Tensor, source: Tensor | None = None
) -> None:
    """Fill out[e] = low^T @ x over the rows of each expert.

    Args:
        low: [rows, R].
        x: [rows, N].
        out: [experts, R, N], written to.
        starts: int [experts + 1], first row of each expert.
        source: row of `x` of each row, or None.
    """
    n, rank, tile_n = x.shape[1], low.shape[1], 128
    meta = {"rank": rank, "rank_tile": max(16, _power_of_2(rank))}
    meta |= {"tile_m": 64, "tile_n": tile_n, "num_warps": 4}
    grid = (out.shape[0], -(-n // tile_n))
    _grouped_outer[grid](low, x, out, starts, source, n, **meta)


TURNED_ROWS, GROUP_BYTES = 256, tl.constexpr(GROUP // 2)
# Rows and columns of a tile, warps, stages: on Hopper, and where 99 KiB of shared memory are all.
INT8_TILES = {True: (128, 128, 8, 4), False: (128, 128, 8, 3)}
FLOOR, BLOCK = tl.constexpr(1e-30), tl.constexpr(128)
TO_WHOLE = tl.constexpr(1.5 * 2**23)  # what is added to it is rounded to a whole number


@triton.jit
def _cast(values, dtype: tl.constexpr):
    """Where the product before is not fused with the sum; see enable_fp_fusion."""
    if dtype == tl.int8:
        values = (values + TO_WHOLE) - TO_WHOLE
    return values.to(dtype)


@triton.jit
def _weight_rows(codes, absmax, table, scales, out, num_bytes, tile: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * tile + tl.arange(0, tile)
    is_in = byte < num_bytes
    pair = tl.load(codes + row * num_bytes + byte, mask=is_in, other=0).to(tl.int32)
    at = absmax + row * (num_bytes // GROUP_BYTES)
    factor = tl.load(at + byte // GROUP_BYTES, mask=is_in, other=0)
    factor = factor * tl.math.div_rn(1.0, tl.load(scales + row))
    even = tl.load(table + (pair >> 4)) * factor
    odd = tl.load(table + (pair & 15)) * factor
    values = _cast(tl.interleave(even, odd), out.dtype.element_ty)
    col = tl.program_id(1) * (2 * tile) + tl.arange(0, 2 * tile)
    tl.store(out + row * (2 * num_bytes) + col, values, mask=col < 2 * num_bytes)


@triton.jit
def _weight_turned(codes, absmax, table, scales, out, num_out, num_bytes, tile: tl.constexpr):
    """One group of columns of `tile` rows: its bytes are turned before they become values."""
    group = tl.program_id(1)
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    byte = tl.arange(0, GROUP_BYTES)
    is_row = row < num_out
    start = codes + group * GROUP_BYTES + tl.program_id(0).to(tl.int64) * tile * num_bytes
    places = tl.arange(0, tile)[:, None] * num_bytes + byte[None, :]
    pair = tl.trans(tl.load(start + places, mask=is_row[:, None], other=0)).to(tl.int32)
    at = row.to(tl.int64) * (num_bytes // GROUP_BYTES) + group
    factor = tl.load(absmax + at, mask=is_row, other=0)
    factor = factor * tl.math.div_rn(1.0, tl.load(scales + row, mask=is_row, other=1.0))
    even = _cast(tl.load(table + (pair >> 4)) * factor[None, :], out.dtype.element_ty)
    odd = _cast(tl.load(table + (pair & 15)) * factor[None, :], out.dtype.element_ty)
    first = out + group.to(tl.int64) * (2 * GROUP_BYTES) * num_out
    places = byte[:, None] * (2 * num_out) + row[None, :]
    tl.store(first + places, even, mask=is_row[None, :])
    tl.store(first + num_out + places, odd, mask=is_row[None, :])


def weight_codes(
    codes: Tensor,
    absmax: Tensor,
    table: Tensor,
    scales_O: Tensor,
    out: Tensor,
    is_turned: bool,
) -> None:
    """Fill `out` with table[4 bits] * (absmax / scale of the row).

    Args:
        codes, absmax, table, scales_O: see matmul.Quantized4.
        out: [O, I], or [I, O] if turned, written to.
        is_turned: see out.
    """
    num_out, num_bytes = scales_O.numel(), codes.numel() // scales_O.numel()
    tensors = codes, absmax, table, scales_O, out
    meta = {"enable_fp_fusion": False, "num_warps": NUM_WARPS}
    if is_turned:
        grid = (-(-num_out // TURNED_ROWS), num_bytes // GROUP_BYTES.value)
        _weight_turned[grid](*tensors, num_out, num_bytes, tile=TURNED_ROWS, **meta)
        return
    grid = (num_out, -(-num_bytes // BYTES_PER_PROGRAM))
    _weight_rows[grid](*tensors, num_bytes, tile=BYTES_PER_PROGRAM, **meta)


@triton.jit
def _quantize_rows(
    parts,
    strides,
    nums,
    factors,
    codes,
    scales,
    width,
    block,
    largest: tl.constexpr,
    tile: tl.constexpr,
):
    """A block of a row, of parts side by side that have one scale.

    It is read twice, the second time from the cache: wide rows do not fit into registers.
    """
    row, first, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * block, 0
    most_T, rest_T = tl.zeros((tile,), tl.float32), tl.zeros((tile,), tl.float32)
    for i in tl.static_range(len(parts)):
        for start in range(first, tl.minimum(nums[i], first + block), tile):
            col = start + tl.arange(0, tile)
            at = parts[i] + row * strides[i] + col
            values = tl.load(at, mask=col < nums[i], other=0).to(tl.float32)
            rest_T += values - values  # 0, not finite where one of them is not
            if factors is not None:
                values *= tl.load(factors + begin + col, mask=col < nums[i], other=0)
            most_T = tl.maximum(most_T, tl.abs(values))
        begin += nums[i]
    most = tl.maximum(tl.max(most_T, 0), FLOOR) + tl.sum(rest_T, 0)
    tl.store(scales + tl.program_id(1) * tl.num_programs(0) + row, tl.math.div_rn(most, largest))
    inverse, begin = tl.math.div_rn(largest, most), 0
    for i in tl.static_range(len(parts)):
        for start in range(first, tl.minimum(nums[i], first + block), tile):
            col = start + tl.arange(0, tile)
            at = parts[i] + row * strides[i] + col
            values = tl.load(at, mask=col < nums[i], other=0).to(tl.float32)
            if factors is not None:
                values *= tl.load(factors + begin + col, mask=col < nums[i], other=0)
            values = tl.minimum(tl.maximum(values * inverse, -largest), largest)
            code = _cast(values, codes.dtype.element_ty)
            tl.store(codes + row * width + begin + col, code, mask=col < nums[i])
        begin += nums[i]


def quantize_rows(
    parts: list[Tensor], factors_I: Tensor | None, dtype: torch.dtype, largest: float, block: int
) -> tuple[Tensor, Tensor]:
    """See matmul.quantize_rows; scales of a block lie together.

    Args:
        parts: rows contiguous; one in blocks.
        factors_I: float32, or None.
        dtype, largest, block: see matmul.Code.
    """
    nums, strides = zip(*[(part.shape[1], part.stride(0)) for part in parts], strict=True)
    num_rows, num_blocks = len(parts[0]), -(-nums[0] // block) if block else 1
    codes = torch.empty(num_rows, sum(nums), dtype=dtype, device=parts[0].device)
    scales = codes.new_empty(num_blocks, num_rows, dtype=torch.float32).t()
    tile = block or (2048 if max(nums) <= 8192 else 4096)
    tensors = tuple(parts), strides, nums, factors_I, codes, scales
    meta = {"tile": tile, "num_warps": max(1, tile // 256), "enable_fp_fusion": False}
    grid = (num_rows, num_blocks)
    _quantize_rows[grid](*tensors, sum(nums), block or max(nums), largest, **meta)
    return codes, scales


@triton.jit
def _add_product(
    out, left, right, alpha, m, n, strides, rank: tl.constexpr, rank_tile: tl.constexpr
):
    """A tile of 64 x 128."""
    row, r = tl.program_id(0) * 64 + tl.arange(0, 64), tl.arange(0, rank_tile)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    is_row, is_col, row = row[:, None] < m, col[None, :] < n, row.to(tl.int64)
    left_at = left + row[:, None] * strides[1] + r[None, :] * strides[2]
    right_at = right + r[:, None] * strides[3] + col[None, :] * strides[4]
    left = tl.load(left_at, mask=is_row & (r < rank)[None, :], other=0.0)
    right = tl.load(right_at, mask=is_col & (r < rank)[:, None], other=0.0)
    at = out + row[:, None] * strides[0] + col[None, :]
    total = tl.load(at, mask=is_row & is_col, other=0.0).to(tl.float32)
    total += alpha * tl.dot(left, right, input_precision="ieee")
    tl.store(at, total.to(out.dtype.element_ty), mask=is_row & is_col)


def add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """Add alpha * left @ right to `out`, at three quarters of the memory's speed: cuBLAS has half.

    Args:
        out: [M, N], rows contiguous.
        left: [M, R].
        right: [R, N].
        alpha: see above.
    """
    (m, n), rank = out.shape, left.shape[1]
    strides = out.stride(0), *left.stride(), *right.stride()
    rest = alpha, m, n, strides, rank, max(16, _power_of_2(rank))
    _add_product[-(-m // 64), -(-n // 128)](out, left, right, *rest)


@triton.jit
def _int8_matmul(
    x,
    y,
    out,
    x_scales,
    y_scales,
    bias,
    low,
    high,
    m,
    n,
    k,
    rank: tl.constexpr,
    is_even: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    band: tl.constexpr,
):
    """Tiles in bands of `band` rows of them, whose operands stay in the cache."""
    down, across = tl.cdiv(m, tile_m), tl.cdiv(n, tile_n)
    first = tl.program_id(0) // (band * across) * band
    height, inside = tl.minimum(down - first, band), tl.program_id(0) % (band * across)
    row = ((first + inside % height) * tile_m + tl.arange(0, tile_m)).to(tl.int64)
    col = ((inside // height) * tile_n + tl.arange(0, tile_n)).to(tl.int64)
    is_row, is_col, at_k = row < m, col < n, tl.arange(0, BLOCK)
    x_at, y_at = x + row[:, None] * k + at_k[None, :], y + col[None, :] * k + at_k[:, None]
    x_scale_at = x_scales + row
    acc = tl.zeros((tile_m, tile_n), dtype=tl.float32)
    for start in range(0, k, BLOCK):
        is_k = at_k < (BLOCK if is_even else k - start)
        left = tl.load(x_at, mask=is_row[:, None] & is_k[None, :], other=0)
        right = tl.load(y_at, mask=is_k[:, None] & is_col[None, :], other=0)
        scale = tl.load(x_scale_at, mask=is_row, other=0.0)
        acc += tl.dot(left, right).to(tl.float32) * scale[:, None]
        x_at += BLOCK
        y_at += BLOCK
        x_scale_at += m
    acc *= tl.load(y_scales + col, mask=is_col, other=0.0)[None, :]
    if low is not None:
        for first in tl.static_range(0, rank, 32):
            acc = _add_low_rank(acc, low, high, row, col, is_row, n, False, rank, 32, first)
    if bias is not None:
        acc += tl.load(bias + col, mask=is_col, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * n + col[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_col[None, :])


def int8_matmul(
    x: tuple[Tensor, Tensor],
    y: tuple[Tensor, Tensor],
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor, float] | None,
) -> Tensor:
    """See matmul.multiply: whole numbers are summed up in each block of 128, blocks in float32.

    Args:
        x, y: int8 codes and scales.
        bias, low_rank: added, or None.
    """
    (codes, scales), (y_codes, y_scales) = x, y
    (m, k), n, low, high = codes.shape, len(y_codes), None, None
    if low_rank is not None:
        low, high = low_rank[0] * low_rank[2], low_rank[1].contiguous()
    out = torch.empty(m, n, dtype=torch.bfloat16, device=codes.device)
    is_wide = codes.is_cuda and torch.cuda.get_device_capability(codes.device)[0] == 9
    tile_m, tile_n, num_warps, num_stages = INT8_TILES[is_wide]
    meta = {"rank": 0 if low is None else low.shape[1], "is_even": k % BLOCK.value == 0}
    meta |= {"tile_m": tile_m, "tile_n": tile_n, "band": 8}
    meta |= {"num_warps": num_warps, "num_stages": num_stages}
    grid = (-(-m // tile_m) * -(-n // tile_n),)
    tensors = codes, y_codes, out, scales, y_scales, bias, low, high
    _int8_matmul[grid](*tensors, m, n, k, **meta)
    return out
