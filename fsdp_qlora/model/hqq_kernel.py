"""HQQ's unpacking as one Triton kernel: bits, zero, scale and rounding in one pass.

Each packed word is read once and all its values written; nothing but the result is allocated. It
is imported only where there is Triton; hqq.py has the same in plain PyTorch.

Legend: the matrix of groups is [rows, cols], one group a row (axis 1) or a column (axis 0); word
[r, c] of [word_rows, cols] holds the values [r + slot * word_rows, c], the first slot in its
highest bits.
"""

import torch
import triton
import triton.language as tl

TILE = 2048  # words of one program: a few wide loads and stores for each of its threads
COLS_AT_AXIS_0 = 256
NUM_WARPS = 4
TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def _unpack(
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


def unpack(
    words: torch.Tensor,
    zero: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
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
    tiles_across = -(-cols // tile_cols)
    tile_rows = TILE // tile_cols
    _unpack[(-(-word_rows // tile_rows) * tiles_across,)](
        words,
        zero,
        scale,
        out,
        rows,
        cols,
        word_rows,
        tiles_across,
        bits=bits,
        slots=10 if bits == 3 else 8 // bits,
        axis=axis,
        math_dtype=TL_DTYPES[math_dtype],
        tile_rows=tile_rows,
        tile_cols=tile_cols,
        num_warps=NUM_WARPS,
    )
