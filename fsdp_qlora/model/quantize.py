"""Base formats: how a frozen weight becomes bytes, and bytes a weight again.

Each format is a row of FORMATS. A row knows which fields it stores per linear (packed weights and
quantisation constants), how to `pack` a weight into them, how to make the constants of a whole
decoder layer usable at once (`constants`), and how to `unpack` one linear. Only this module knows
bitsandbytes and hqq.

Shape letters: O out features, I in features, N = O*I weights of a linear.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from fsdp_qlora.errors import UserError

Fields = dict[str, torch.Tensor]
NESTED_BLOCK = 256  # constants that share one second-level constant in double quantisation
GROUP_SIZE = 64  # weights that share one constant


@dataclass(frozen=True)
class Field:
    """One stored array of a linear.

    Attributes:
        name: of the field.
        dtype: of its elements.
        num_weights: weights that share one element.
        multiple: the number of elements is rounded up to a multiple of it.
    """

    name: str
    dtype: torch.dtype
    num_weights: int
    multiple: int = 1

    def num_elements(self, num_weights: int) -> int:
        """Elements stored for a linear of `num_weights` weights."""
        num = -(-num_weights // self.num_weights)
        return -(-num // self.multiple) * self.multiple


@dataclass(frozen=True)
class Format:
    """A row of FORMATS.

    Attributes:
        weight_bits: bits of one packed weight.
        fields: the quantisation constants stored per linear, beside its packed weight ("weight",
            bytes).
        pack: weight_OI -> {field name: 1-D tensor}, at most `num_elements` long.
        constants: (fields of all linears of a layer, compute dtype) -> tensors, each indexed like
            `index_field`.
        index_field: the field whose element ranges cut the tensors of `constants` into linears
            ("" = no constants).
        is_sequential: the bytes and constants of several linears, one after the other, are those of
            one long linear.
        unpack: (packed bytes, constants of the linear, shape, compute dtype) -> weight_OI in the
            compute dtype.
    """

    weight_bits: int
    fields: tuple[Field, ...]
    pack: Callable[[torch.Tensor], Fields]
    constants: Callable[[Fields, torch.dtype], Sequence[torch.Tensor]]
    index_field: str
    unpack: Callable[
        [torch.Tensor, Sequence[torch.Tensor], Sequence[int], torch.dtype], torch.Tensor
    ]
    is_sequential: bool = True


def import_bitsandbytes():
    """bitsandbytes.functional, imported without the warning of its CPU kernels.

    ("Failed to load CPU gemm_4bit_forward" is harmless: that kernel is not used.)
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional as bnb

    return bnb


def _pack_bnb(weight_OI: torch.Tensor, quant_type: str, double: bool) -> Fields:
    bnb = import_bitsandbytes()
    packed, state = bnb.quantize_4bit(
        weight_OI.contiguous(),
        blocksize=GROUP_SIZE,
        quant_type=quant_type,
        compress_statistics=double,
        quant_storage=torch.uint8,
    )
    if not double:
        return {"weight": packed.view(-1), "absmax": state.absmax}
    nested = state.state2.absmax
    return {
        "weight": packed.view(-1),
        "qabsmax": state.absmax,
        "nested_absmax": nested,
        "offset": state.offset.expand_as(nested),
    }


def _absmax(fields: Fields, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    return (fields["absmax"],)


def _nested_absmax(fields: Fields, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """Second-level constants to absmax, for all linears of a layer in one kernel.

    Source: QLoRA, arXiv 2305.14314, section 3, double quantisation.
    """
    nested = fields["nested_absmax"]
    code = dynamic_map(nested.device)
    absmax = torch.ops.bitsandbytes.dequantize_blockwise(
        fields["qabsmax"], nested, code, NESTED_BLOCK, torch.float32
    )
    absmax.view(-1, NESTED_BLOCK).add_(fields["offset"].unsqueeze(1))
    return (absmax,)


@lru_cache
def dynamic_map(device: torch.device) -> torch.Tensor:
    """bitsandbytes' 256-entry code of 8-bit constants, float32, one copy per device."""
    return import_bitsandbytes().create_dynamic_map().to(device)


def _unpack_bnb(packed, constants, shape, dtype, quant_type: str) -> torch.Tensor:
    return torch.ops.bitsandbytes.dequantize_4bit(
        packed.view(-1, 1), constants[0], GROUP_SIZE, quant_type, shape, dtype
    )


def import_hqq():
    """Import hqq.

    Returns:
        Its Quantizer class.

    Raises:
        UserError: hqq is not installed (it has no wheel, so it is optional).
    """
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        raise UserError(
            f"hqq cannot be imported ({error})",
            "an HQQ base needs the hqq package",
            "pip install hqq, or use --train_type qlora",
            code=3,
        ) from None
    return Quantizer


def _pack_hqq(weight_OI: torch.Tensor) -> Fields:
    packed, meta = import_hqq().quantize(
        weight_OI, nbits=4, group_size=GROUP_SIZE, axis=1, device=weight_OI.device.type
    )
    return {
        "weight": packed.view(-1),
        "scale": meta["scale"].view(-1).bfloat16(),
        "zero": meta["zero"].view(-1).bfloat16(),
    }


def _hqq_constants(fields: Fields, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    return fields["zero"].to(dtype), fields["scale"].to(dtype)


def _unpack_hqq(packed, constants, shape, dtype) -> torch.Tensor:
    """(q - zero) * scale, in hqq's order of nibbles: high ones hold the first half of the groups.

    Source: mobiusml/hqq, hqq/core/bitpack.py (unpack_4bit_u8) and quantize.py (dequantize).
    """
    zero, scale = constants
    nibbles = torch.stack((packed >> 4, packed & 15)).view(-1, GROUP_SIZE)
    return (nibbles.to(dtype).sub_(zero.unsqueeze(1))).mul_(scale.unsqueeze(1)).view(shape)


def _pack_bf16(weight_OI: torch.Tensor) -> Fields:
    return {"weight": weight_OI.bfloat16().contiguous().view(-1).view(torch.uint8)}


def _no_constants(fields: Fields, dtype: torch.dtype) -> Sequence[torch.Tensor]:
    return ()


def _unpack_bf16(packed, constants, shape, dtype) -> torch.Tensor:
    return packed.view(torch.bfloat16).view(shape).to(dtype)


_ABSMAX = (Field("absmax", torch.float32, GROUP_SIZE),)
_NESTED_ABSMAX = (
    Field("qabsmax", torch.uint8, GROUP_SIZE, multiple=NESTED_BLOCK),
    Field("nested_absmax", torch.float32, GROUP_SIZE * NESTED_BLOCK),
    Field("offset", torch.float32, GROUP_SIZE * NESTED_BLOCK),
)
_SCALE_ZERO = (
    Field("scale", torch.bfloat16, GROUP_SIZE),
    Field("zero", torch.bfloat16, GROUP_SIZE),
)


def _bnb_row(quant_type: str, double: bool) -> Format:
    return Format(
        weight_bits=4,
        fields=_NESTED_ABSMAX if double else _ABSMAX,
        pack=partial(_pack_bnb, quant_type=quant_type, double=double),
        constants=_nested_absmax if double else _absmax,
        index_field="qabsmax" if double else "absmax",
        unpack=partial(_unpack_bnb, quant_type=quant_type),
    )


FORMATS: dict[str, Format] = {
    "nf4": _bnb_row("nf4", double=False),
    "nf4_dq": _bnb_row("nf4", double=True),
    "fp4": _bnb_row("fp4", double=False),
    "fp4_dq": _bnb_row("fp4", double=True),
    "hqq4": Format(
        4, _SCALE_ZERO, _pack_hqq, _hqq_constants, "scale", _unpack_hqq, is_sequential=False
    ),
    "bf16": Format(16, (), _pack_bf16, _no_constants, "", _unpack_bf16),
}
