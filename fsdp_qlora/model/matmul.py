"""Frozen matmuls in 8 bit: e4m3 codes of a 4-bit weight, made anew for each matmul.

A product of two e4m3 matrices runs at twice the rate of bfloat16 on data-centre GPUs from Hopper
on, and wants both contiguous along the sum. From 4-bit codes both layouts of W are free to make.
Each row of W has one scale, its largest constant / 448: no pass over W. In the gradient of x that
scale stands along the sum, so it is multiplied into dy before dy is quantized; x and dy are
quantized by row (of tokens). LoRA, attention, norms and loss stay as they are.

Scales have a floor (rows of zeros are common: dy of untrained tokens), and a row with a number that
is not finite has a scale that is none, so that the result is not finite either: a cast saturates
and would hide the overflow from the guard.

Shape letters: M tokens, I in features, O out features of all linears that read one input.

Source: e4m3, arXiv 2209.05433; scales by row, torch._scaled_mm.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fsdp_qlora.arch.files import GROUP
from fsdp_qlora.planning.sizes import FP8_TOKENS

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
FLOOR = 1e-30  # of a scale


class Quantized4(NamedTuple):
    """The 4-bit weights of linears that read one input, one below the other.

    Attributes:
        codes: uint8 [O * I / 2], the high bits of a byte first.
        absmax: float32 [O * I / 64].
        table: float32 [16], the values of the code, none above 1.
        scales_O: float32, of each row: with it the row's largest possible value becomes 448.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor
    scales_O: torch.Tensor

    @property
    def num_in(self) -> int:
        """I, a multiple of 64."""
        return self.codes.numel() * 2 // self.scales_O.numel()


def row_scales(absmax: torch.Tensor, num_out: int) -> torch.Tensor:
    """See Quantized4.scales_O.

    Args:
        absmax: float32 [O * I / 64].
        num_out: O.
    """
    return absmax.view(num_out, -1).amax(1).clamp_(min=FLOOR).div_(LARGEST)


def serves(linears: Sequence[Any], x_MI: torch.Tensor) -> bool:
    """Whether the product of linears runs in 8 bit.

    Args:
        linears: that read x, all of one group; the first may have `quantized`, which gives the
            Quantized4 of all.
        x_MI: their input.
    """
    first = linears[0]
    if getattr(first, "quantized", None) is None or len(linears) < len(first.group.linears):
        return False
    return x_MI.shape[0] >= FP8_TOKENS and x_MI.dtype == torch.bfloat16 and first.training


def products(x_MI: torch.Tensor, linears: Sequence[Any]) -> list[torch.Tensor]:
    """x W^T + bias of every linear.

    Args:
        x_MI: bfloat16.
        linears: see `serves`.

    Returns:
        bfloat16 [M, O] of each linear.
    """
    weight, sizes = linears[0].quantized(), [linear.out_features for linear in linears]
    codes_MI, scales_M1 = quantize_rows(x_MI)
    parts, outs = weight_codes(weight, False).split(sizes), []
    rows = zip(linears, parts, weight.scales_O.split(sizes), strict=True)
    for linear, codes_OI, scales_O in rows:
        out_MO = multiply(codes_MI, scales_M1, codes_OI, scales_O, True)
        outs.append(out_MO if linear.bias is None else out_MO.add_(linear.bias))
    return outs


def input_gradient(grads_MO: Sequence[torch.Tensor], linears: Sequence[Any]) -> torch.Tensor:
    """Sum of dy W over linears, as one product.

    Args:
        grads_MO: of the outputs.
        linears: see `serves`.

    Returns:
        bfloat16 [M, I].
    """
    weight = linears[0].quantized()
    grad_MO = grads_MO[0] if len(grads_MO) == 1 else torch.cat(list(grads_MO), 1)
    codes_MO, scales_M1 = quantize_rows(grad_MO, weight.scales_O)
    codes_IO = weight_codes(weight, True)
    ones_I = torch.ones(weight.num_in, device=grad_MO.device)
    return multiply(codes_MO, scales_M1, codes_IO, ones_I, False)


def quantize_rows(
    x_MI: torch.Tensor, factors_I: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of every row, and its scale.

    Args:
        x_MI: bfloat16.
        factors_I: float32, multiplied into each row first; or None.

    Returns:
        e4m3 [M, I], float32 [M, 1].
    """
    if x_MI.is_cuda:
        x_MI = x_MI if x_MI.stride(1) == 1 else x_MI.contiguous()
        return _kernels().quantize_rows(x_MI, factors_I)
    values = x_MI.float() if factors_I is None else x_MI.float() * factors_I
    most = values.abs().amax(1, keepdim=True).clamp_min(FLOOR)
    most = most + (values - values).sum(1, keepdim=True)  # not finite where one of them is not
    inverse = torch.full_like(most, LARGEST) / most  # a number / a tensor would be rounded twice
    return (values * inverse).clamp(-LARGEST, LARGEST).to(FP8), most / LARGEST


def weight_codes(weight: Quantized4, is_turned: bool) -> torch.Tensor:
    """W by the scales of its rows.

    Args:
        weight: W.
        is_turned: see below.

    Returns:
        e4m3 [O, I], or [I, O] if turned.
    """
    shape = weight.scales_O.numel(), weight.num_in
    if weight.codes.is_cuda:
        out = weight.codes.new_empty(shape[::-1] if is_turned else shape, dtype=FP8)
        _kernels().weight_codes(*weight, out, is_turned, GROUP)
        return out
    pairs = torch.stack((weight.codes >> 4, weight.codes & 15), 1)
    factors = weight.absmax.view(shape[0], -1) * (1.0 / weight.scales_O)[:, None]
    values = weight.table[pairs.view(-1, GROUP).int()] * factors.view(-1, 1)
    codes_OI = values.view(shape).to(FP8)
    return codes_OI.t().contiguous() if is_turned else codes_OI


def multiply(
    codes_MK: torch.Tensor,
    scales_M1: torch.Tensor,
    codes_NK: torch.Tensor,
    scales_N: torch.Tensor,
    is_fast: bool,
) -> torch.Tensor:
    """x y^T of two quantized matrices.

    Args:
        codes_MK, scales_M1: of x.
        codes_NK, scales_N: of y.
        is_fast: sum up in the tensor cores' own registers, as the forward pass may.

    Returns:
        bfloat16 [M, N].
    """
    if not codes_MK.is_cuda:
        product = (codes_MK.float() * scales_M1) @ (codes_NK.float() * scales_N[:, None]).t()
        return product.bfloat16()
    rest: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": is_fast}
    return torch._scaled_mm(codes_MK, codes_NK.t(), scales_M1, scales_N[None], **rest)


def _kernels() -> Any:
    from fsdp_qlora.model import triton_kernels

    return triton_kernels
