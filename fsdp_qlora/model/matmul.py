"""Frozen matmuls in 8 bit: e4m3 codes of a 4-bit weight, made anew for each matmul as its 16 bits are.

A product of two e4m3 matrices runs at twice the rate of bfloat16 on data-centre GPUs from Hopper on,
and wants both matrices contiguous along the sum. From 4-bit codes both layouts of W are free to make.
Each row of W has one scale, its largest constant / 448: no pass over W. In the gradient of x that
scale stands along the sum, so it is multiplied into dy before dy is quantized; x and dy are
quantized by row (of tokens). LoRA, attention, norms and loss stay as they are.

Scales have a floor (rows of zeros are common: dy of untrained tokens), and a row with a number that
is not finite has a scale that is none, so that the result is not finite either: a cast saturates and
would hide the overflow from the guard.

Shape letters: M tokens, I in features, O out features (of all linears of a group together).

Source: e4m3, arXiv 2209.05433; scales by row, torch._scaled_mm.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fsdp_qlora.arch.files import GROUP

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
FLOOR = 1e-30  # of a scale
MIN_TOKENS = 1024  # fewer gain nothing: the cost of the codes of W


class Quantized4(NamedTuple):
    """A linear's 4-bit weight.

    Attributes:
        codes: uint8 [O * I / 2], the high bits of a byte first.
        absmax: float32 [O * I / 64].
        table: float32 [16].
        shape: (O, I), I a multiple of 64.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    table: torch.Tensor
    shape: tuple[int, int]

    @property
    def scales_O(self) -> torch.Tensor:
        """float32: of each row, with which its largest possible value becomes 448."""
        rows = self.absmax.view(self.shape[0], -1)
        return rows.amax(1).clamp_min_(FLOOR).div_(LARGEST)


def serves(linears: Sequence[Any], x_MI: torch.Tensor) -> bool:
    """Whether a product of linears runs in 8 bit.

    Args:
        linears: that read x; those that may have `quantized`, which gives their Quantized4.
        x_MI: their input.
    """
    has_codes = all(getattr(linear, "quantized", None) is not None for linear in linears)
    is_large = x_MI.shape[0] >= MIN_TOKENS and x_MI.dtype == torch.bfloat16
    return has_codes and is_large and linears[0].training


def add_products(
    x_MI: torch.Tensor, linears: Sequence[Any], deltas_MO: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """delta + x W^T + bias of every linear.

    Args:
        x_MI: bfloat16.
        linears: see `serves`.
        deltas_MO: added to in place; None where there is none.

    Returns:
        bfloat16 [M, O] of each linear.
    """
    codes, scales = quantize_rows(x_MI)
    outs = []
    for linear, delta_MO in zip(linears, deltas_MO, strict=True):
        out_MO = multiply(codes, scales, *weight_rows(linear.quantized()), True)
        out_MO = out_MO if delta_MO is None else delta_MO.add_(out_MO)
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
    codes_IO, scales_O = weights_turned([linear.quantized() for linear in linears])
    grad_MO = grads_MO[0] if len(grads_MO) == 1 else torch.cat(list(grads_MO), 1)
    return multiply(*quantize_rows(grad_MO, scales_O), codes_IO, None, False)


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
    return (values * (LARGEST / most)).clamp(-LARGEST, LARGEST).to(FP8), most / LARGEST


def weight_rows(weight: Quantized4) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of W as it is, and the scale of every row.

    Args:
        weight: of one linear.

    Returns:
        e4m3 [O, I], float32 [O].
    """
    scales_O = weight.scales_O
    codes_OI = torch.empty(weight.shape, dtype=FP8, device=weight.codes.device)
    _fill(weight, scales_O, codes_OI, False)
    return codes_OI, scales_O


def weights_turned(weights: Sequence[Quantized4]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the weights of linears with one input, side by side and turned, and their scales.

    Args:
        weights: of the linears.

    Returns:
        e4m3 [I, O], float32 [O].
    """
    first, sizes = weights[0], [weight.shape[0] for weight in weights]
    codes_IO = torch.empty(first.shape[1], sum(sizes), dtype=FP8, device=first.codes.device)
    scales = [weight.scales_O for weight in weights]
    for part_IO, weight, scales_O in zip(codes_IO.split(sizes, 1), weights, scales, strict=True):
        _fill(weight, scales_O, part_IO, True)
    return codes_IO, scales[0] if len(scales) == 1 else torch.cat(scales)


def multiply(
    codes_MK: torch.Tensor,
    scales_M1: torch.Tensor,
    codes_NK: torch.Tensor,
    scales_N: torch.Tensor | None,
    is_fast: bool,
) -> torch.Tensor:
    """x y^T of two quantized matrices.

    Args:
        codes_MK, scales_M1: of x.
        codes_NK, scales_N: of y; None: all scales are one.
        is_fast: sum up in the tensor cores' own registers, as the forward pass may.

    Returns:
        bfloat16 [M, N].
    """
    if scales_N is None:
        scales_N = torch.ones(codes_NK.shape[0], device=codes_NK.device)
    if not codes_MK.is_cuda:
        product = (codes_MK.float() * scales_M1) @ (codes_NK.float() * scales_N[:, None]).t()
        return product.bfloat16()
    rest: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": is_fast}
    return torch._scaled_mm(codes_MK, codes_NK.t(), scales_M1, scales_N[None], **rest)


def _fill(
    weight: Quantized4, scales_O: torch.Tensor, out: torch.Tensor, is_turned: bool
) -> None:
    if out.is_cuda:
        _kernels().weight_codes(*weight[:3], scales_O, out, is_turned, GROUP)
        return
    pairs = torch.stack((weight.codes >> 4, weight.codes & 15), 1)
    values = weight.table[pairs.view(-1, GROUP).long()] * weight.absmax[:, None]
    codes_OI = (values.view(weight.shape) * (1.0 / scales_O)[:, None]).to(FP8)
    out.copy_(codes_OI.t() if is_turned else codes_OI)


def _kernels() -> Any:
    from fsdp_qlora.model import triton_fp8

    return triton_fp8
