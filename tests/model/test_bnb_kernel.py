"""The Triton kernels of bitsandbytes' 4-bit formats have the bits of bitsandbytes itself."""

import itertools

import pytest
import torch

from fsdp_qlora.arch.files import GROUP
from fsdp_qlora.model.quantize import (
    FORMATS,
    dynamic_map,
    import_bitsandbytes,
    mxfp4_values,
    values_of,
)
from tests import tiny


@pytest.fixture
def kernel():
    """On a card as it is; elsewhere by Triton's interpreter, where Triton is installed."""
    tiny.require_triton()
    from fsdp_qlora.model import triton_kernels

    return triton_kernels


def test_weights_have_the_bits_of_bitsandbytes(kernel):
    """Whole and broken last programs; the interpreter cuts a bfloat16 off, so not in that dtype."""
    import_bitsandbytes()
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * (tiny.DEVICE == "cuda")
    for quant_type, dtype, rows in itertools.product(("nf4", "fp4"), dtypes, (64, 67)):
        shape = (rows, 128)
        num = rows * 128
        packed = torch.randint(0, 256, (num // 2, 1), dtype=torch.uint8, device=tiny.DEVICE)
        absmax = torch.rand(num // GROUP, device=tiny.DEVICE)
        expected = torch.ops.bitsandbytes.dequantize_4bit(
            packed, absmax, GROUP, quant_type, shape, dtype
        )
        out = torch.full_like(expected, float("nan"))
        table = values_of(quant_type, packed.device)
        kernel.dequantize_bnb(packed.view(-1), absmax, table, out, GROUP)
        assert torch.equal(out, expected), (quant_type, dtype, rows)


def test_weights_of_mxfp4_have_the_bits_of_transformers(kernel):
    """All codes and exponents but that of no number; low bits first."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    dtype = torch.bfloat16 if tiny.DEVICE == "cuda" else torch.float32
    blocks = torch.randint(0, 256, (3, 32, 17, 16), dtype=torch.uint8, device=tiny.DEVICE)
    scales = torch.randint(1, 251, (3, 32, 17), dtype=torch.uint8, device=tiny.DEVICE)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    flat = blocks.view(-1), [scales.view(-1)], expected.shape, dtype
    own = FORMATS["mxfp4"].dequantize(*flat)
    assert torch.equal(own, expected)
    out = torch.full_like(own, float("nan"))
    kernel.dequantize_bnb(blocks.view(-1), scales.view(-1), mxfp4_values(out.device), out, 32)
    assert torch.equal(out, expected)


def test_constants_have_the_bits_of_bitsandbytes(kernel):
    """Product and sum are rounded one after the other."""
    import_bitsandbytes()
    torch.manual_seed(0)
    quantised = torch.randint(0, 256, (256 * 9,), dtype=torch.uint8, device=tiny.DEVICE)
    nested, offset = (torch.rand(9, device=tiny.DEVICE) for _ in range(2))
    code = dynamic_map(nested.device)
    expected = torch.ops.bitsandbytes.dequantize_blockwise(
        quantised, nested, code, 256, torch.float32
    )
    expected.view(-1, 256).add_(offset.unsqueeze(1))
    assert torch.equal(kernel.expand(quantised, nested, offset, code, 256), expected)


def test_matrices_that_lie_apart_are_filled_as_one(kernel):
    """Gate above, up below in one tensor: each half of every matrix is written by itself."""
    packed = torch.randint(0, 256, (3 * 64 * 64,), dtype=torch.uint8, device=tiny.DEVICE)
    absmax = torch.rand(3 * 64 * 128 // GROUP, device=tiny.DEVICE)
    table = values_of("nf4", packed.device)
    whole = torch.full((3 * 64, 128), float("nan"), device=tiny.DEVICE)
    kernel.dequantize_bnb(packed, absmax, table, whole, GROUP)
    both = torch.zeros(3, 2 * 64, 128, device=tiny.DEVICE)
    kernel.dequantize_bnb(packed, absmax, table, both[:, 64:], GROUP)
    assert torch.equal(both[:, 64:], whole.view(3, 64, 128))
    assert not both[:, :64].any()
