"""Frozen matmuls in 8 bit: codes of a 4-bit weight in e4m3 or int8, made anew for each matmul.

Or in float16 summed up in float16, at twice the rate on GeForce: weights and inputs are as exact as
in bfloat16, the sums are not.

A product of two matrices in 8 bit runs at twice the rate of bfloat16 and more: of e4m3 on
data-centre GPUs from Hopper on, of int8 on those before and on GeForce. It wants both contiguous
along the sum. From 4-bit codes both layouts of W are free to make. Each row of W has one scale, its
largest constant / the largest code: no pass over W. In the gradient of x that scale stands along
the sum, so it is multiplied into dy before dy is quantized; x and dy are quantized by row (of
tokens); in int8, which has no exponent for outliers, by row and block of 128, and the few inputs
with the largest numbers are left out and added in 16 bit, with LoRA's product. LoRA, attention,
norms and loss stay as they are.

Scales have a floor (rows of zeros are common: dy of untrained tokens), and a row with a number that
is not finite has a scale that is none, so that the result is not finite either: a cast saturates
and would hide the overflow from the guard.

Shape letters: M tokens, I in features, O out features of all linears that read one input, B blocks.

Source: e4m3, arXiv 2209.05433; scales by row, torch._scaled_mm; by block, arXiv 2412.19437, 3.3.2.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

from fsdp_qlora.arch.files import GROUP
from fsdp_qlora.planning.sizes import MIN_TOKENS_8_BIT

FLOOR = 1e-30  # of a scale
BLOCK = 128  # inputs that share a scale of x in int8
MOST_RANKS = 64  # of the own kernel that adds LoRA's product; with 192 cuBLAS is faster


@lru_cache
def triton_kernels(is_cuda: bool = True) -> Any:
    """The module triton_kernels.py; None on a CPU, and where torch came without Triton."""
    try:
        return import_module("fsdp_qlora.model.triton_kernels") if is_cuda else None
    except ImportError:
        return None


class Code(NamedTuple):
    """How 8 bits stand for a number.

    Attributes:
        dtype: of codes.
        largest: code.
        block: inputs of a row of x that share a scale; 0: all.
        outliers: the largest inputs of all rows, which stay in 16 bit in the forward pass.
    """

    dtype: torch.dtype
    largest: float
    block: int
    outliers: int


CODES = {"fp8": Code(torch.float8_e4m3fn, 448.0, 0, 0), "int8": Code(torch.int8, 127.0, BLOCK, 16)}
Pair = tuple[torch.Tensor, torch.Tensor]  # codes, scales
LowRank = tuple[torch.Tensor, torch.Tensor, float]  # hidden_MR, b_OR, scale


class Quantized4(NamedTuple):
    """The 4-bit weights of linears that read one input, one below the other.

    Attributes:
        codes: uint8 [O * I / 2], the high bits of a byte first; I is a multiple of 64.
        absmax: float32 [O * I / 64].
        table: float32 [16], the values of the 4-bit code, none above 1.
        scales_O: float32, of each row: with it the row's largest possible value becomes the
            largest code.
        code: in 8 bit.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor
    scales_O: torch.Tensor
    code: Code


class Quantized8(NamedTuple):
    """The same of a format that is dequantized first, and then quantized by row.

    Attributes:
        codes_OI: of 8 bit.
        scales_O: float32.
        code: see Quantized4.
    """

    codes_OI: torch.Tensor
    scales_O: torch.Tensor
    code: Code


def row_scales(absmax: torch.Tensor, num_out: int, code: Code) -> torch.Tensor:
    """See Quantized4.scales_O.

    Args:
        absmax: float32 [O * I / 64].
        num_out: O.
        code: in 8 bit.
    """
    return absmax.view(num_out, -1).amax(1).clamp_(min=FLOOR).div_(code.largest)


def serves(linears: Sequence[Any], x_MI: torch.Tensor) -> bool:
    """Whether the product of linears runs in 8 bit.

    Args:
        linears: that read x, all of one group; the first may have `quantized`, which gives the
            weights of all.
        x_MI: their input.
    """
    first = linears[0]
    if getattr(first, "quantized", None) is None or len(linears) < len(first.group.linears):
        return False
    return _is_large(x_MI, first)


def _is_large(x_MI: torch.Tensor, linear: Any) -> bool:
    return linear.training and len(x_MI) >= MIN_TOKENS_8_BIT and x_MI.dtype == torch.bfloat16


def dtype_of(linear: Any, x_MI: torch.Tensor) -> torch.dtype:
    """Of the weight that a product of 16 bit takes: float16 where it is summed up in that.

    Args:
        linear: that reads x.
        x_MI: its input.
    """
    return torch.float16 if linear.sums_in_fp16 and _is_large(x_MI, linear) else x_MI.dtype


def plus_product(
    total_MN: torch.Tensor | None, x_MK: torch.Tensor, y_KN: torch.Tensor
) -> torch.Tensor:
    """total + x y, written into total where there is one.

    Rows of x are multiplied by powers of two, so that float16 has them exactly; a sum beyond its
    range is not finite, which the guard sees.

    Args:
        total_MN: of the dtype of x, or None.
        x_MK: 16 bit.
        y_KN: of the same dtype; or float16 beside bfloat16: sums are made in float16.
    """
    if x_MK.dtype == y_KN.dtype:
        return x_MK @ y_KN if total_MN is None else total_MN.addmm_(x_MK, y_KN)
    most_M1 = torch.linalg.vector_norm(x_MK, torch.inf, 1, keepdim=True).float()
    powers_M1 = torch.ldexp(torch.ones_like(most_M1), most_M1.frexp().exponent)
    half_MK = torch.div(x_MK, powers_M1, out=torch.empty_like(x_MK, dtype=torch.float16))
    flags = torch.backends.cuda.matmul  # a CPU sums up in float32
    before, flags.allow_fp16_accumulation = flags.allow_fp16_accumulation, True
    try:
        product_MN = half_MK @ y_KN
    finally:  # also where memory has run out: the process may multiply for others
        flags.allow_fp16_accumulation = before
    own_MN = torch.mul(product_MN, powers_M1, out=torch.empty_like(product_MN, dtype=x_MK.dtype))
    return own_MN if total_MN is None else total_MN.add_(own_MN)


def add_product(
    total_MN: torch.Tensor, left_MR: torch.Tensor, right_RN: torch.Tensor, scale: float = 1.0
) -> None:
    """Add a product of low rank to a matrix: the time is that of reading and writing it once.

    Args:
        total_MN: written to; rows contiguous.
        left_MR, right_RN: of its dtype.
        scale: of the product.
    """
    kernels = triton_kernels(total_MN.is_cuda and total_MN.dtype == torch.bfloat16)
    if kernels and left_MR.shape[1] <= MOST_RANKS:
        kernels.add_product(total_MN, left_MR, right_RN, scale)
    else:
        total_MN.addmm_(left_MR, right_RN, alpha=scale)


def products(
    x_MI: torch.Tensor, linears: Sequence[Any], low_ranks: Mapping[Any, LowRank]
) -> list[torch.Tensor]:
    """x W^T + bias of every linear, and its LoRA product.

    Args:
        x_MI: bfloat16.
        linears: see `serves`.
        low_ranks: linear -> what is added to its product: scale * hidden_MR b_OR^T.

    Returns:
        bfloat16 [M, O] of each linear.
    """
    weight, sizes = linears[0].quantized(), [linear.out_features for linear in linears]
    codes_OI, factors_I = weight_codes(weight, False), None
    if weight.code.outliers:
        places = torch.linalg.vector_norm(x_MI, torch.inf, dim=0).topk(weight.code.outliers).indices
        factors_I = torch.ones(x_MI.shape[1], device=x_MI.device).index_fill_(0, places, 0)
        low, high_OR = x_MI[:, places], codes_OI[:, places] * weight.scales_O[:, None]
        rows = zip(linears, high_OR.to(x_MI.dtype).split(sizes), strict=True)
        low_ranks = {linear: _joined((low, high), low_ranks.get(linear)) for linear, high in rows}
    pair = quantize_rows([x_MI], weight.code, factors_I)
    parts = zip(codes_OI.split(sizes), weight.scales_O.split(sizes), strict=True)
    return [
        multiply(pair, own, True, linear.bias, low_ranks.get(linear))
        for linear, own in zip(linears, parts, strict=True)
    ]


def _joined(columns: Pair, low_rank: LowRank | None) -> LowRank:
    if low_rank is None:
        return *columns, 1.0
    hidden_MR, b_OR, scale = low_rank
    both = torch.cat((hidden_MR * scale, columns[0]), 1), torch.cat((b_OR, columns[1]), 1)
    return *both, 1.0


def input_gradient(grads_MO: Sequence[torch.Tensor], linears: Sequence[Any]) -> torch.Tensor:
    """Sum of dy W over linears, as one product.

    Args:
        grads_MO: of the outputs.
        linears: see `serves`.

    Returns:
        bfloat16 [M, I].
    """
    weight = linears[0].quantized()
    pair = quantize_rows(grads_MO, weight.code, weight.scales_O)
    codes_IO = weight_codes(weight, True)
    return multiply(pair, (codes_IO, torch.ones(len(codes_IO), device=codes_IO.device)), False)


def quantize_rows(
    parts: Sequence[torch.Tensor], code: Code, factors_I: torch.Tensor | None = None
) -> Pair:
    """Codes of every row, and the scale of each of its blocks.

    Args:
        parts: bfloat16 [M, I of each], side by side; three at most.
        code: in 8 bit.
        factors_I: float32, multiplied into each row first; or None.

    Returns:
        code.dtype [M, I], float32 [M, B].
    """
    if len(parts) > 1 and (code.block or not parts[0].is_cuda):
        parts = [torch.cat(tuple(parts), 1)]
    if parts[0].is_cuda:
        parts = [x if x.stride(1) == 1 else x.contiguous() for x in parts]
        return triton_kernels().quantize_rows(parts, factors_I, *code[:3])
    (x_MI,) = parts
    num_rows, num = x_MI.shape
    values = x_MI.float() if factors_I is None else x_MI.float() * factors_I
    block = code.block or num
    values = torch.nn.functional.pad(values, (0, -num % block)).view(num_rows, -1, block)
    most = values.abs().amax(2, keepdim=True).clamp_min(FLOOR)
    most = most + (values - values).sum(2, keepdim=True)  # not finite where one of them is not
    inverse = torch.full_like(most, code.largest) / most  # a number / a tensor would round twice
    quotients = (values * inverse).clamp(-code.largest, code.largest).view(num_rows, -1)[:, :num]
    return _cast(quotients, code), most[:, :, 0] / code.largest


def weight_codes(weight: Quantized4 | Quantized8, is_turned: bool) -> torch.Tensor:
    """W by the scales of its rows.

    Args:
        weight: W.
        is_turned: see below.

    Returns:
        8 bit [O, I], or [I, O] if turned.
    """
    if isinstance(weight, Quantized8):
        return weight.codes_OI.t().contiguous() if is_turned else weight.codes_OI
    *parts, code = weight
    shape = len(weight.scales_O), weight.codes.numel() * 2 // len(weight.scales_O)
    if weight.codes.is_cuda:
        out = weight.codes.new_empty(shape[::-1] if is_turned else shape, dtype=code.dtype)
        triton_kernels().weight_codes(*parts, out, is_turned)
        return out
    pairs = torch.stack((weight.codes >> 4, weight.codes & 15), 1)
    factors = weight.absmax.view(shape[0], -1) * (1.0 / weight.scales_O)[:, None]
    values = weight.table[pairs.view(-1, GROUP).int()] * factors.view(-1, 1)
    codes_OI = _cast(values.view(shape), code)
    return codes_OI.t().contiguous() if is_turned else codes_OI


def _cast(values: torch.Tensor, code: Code) -> torch.Tensor:
    return (values if code.dtype.is_floating_point else values.round()).to(code.dtype)


def multiply(
    x: Pair,
    y: Pair,
    is_fast: bool,
    bias_N: torch.Tensor | None = None,
    low_rank: LowRank | None = None,
) -> torch.Tensor:
    """x y^T of two quantized matrices.

    Args:
        x: codes [M, K], scales [M, B].
        y: codes [N, K], scales [N].
        is_fast: sum e4m3 up in the tensor cores' own registers, as the forward pass may.
        bias_N: added, or None.
        low_rank: added, or None; see `products`.

    Returns:
        bfloat16 [M, N].
    """
    (codes_MK, scales_MB), (codes_NK, scales_N) = x, y
    if codes_MK.is_cuda and codes_MK.dtype == torch.int8:
        return triton_kernels().int8_matmul(x, y, bias_N, low_rank)
    if codes_MK.is_cuda:
        rest: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": is_fast}
        out_MN = torch._scaled_mm(codes_MK, codes_NK.t(), scales_MB, scales_N[None], **rest)
    else:
        num = codes_MK.shape[1]
        scales_MK = scales_MB.repeat_interleave(BLOCK if scales_MB.shape[1] > 1 else num, 1)
        product = codes_MK.float() * scales_MK[:, :num] @ (codes_NK.float() * scales_N[:, None]).t()
        out_MN = product.bfloat16()
    if bias_N is not None:
        out_MN.add_(bias_N)
    if low_rank is not None:
        add_product(out_MN, low_rank[0], low_rank[1].t(), low_rank[2])
    return out_MN
