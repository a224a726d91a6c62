"""The errors that formats make, on weights as random initialisation leaves them."""

import pytest
import torch

from fsdp_qlora import arch
from fsdp_qlora.model import quantize
from fsdp_qlora.model.weights import Weights
from fsdp_qlora.planning.sizes import FORMATS
from tests import tiny

# Largest relative error ||dequantized - weight|| / ||weight|| of normal weights, by bits of HQQ and
# group size, else by name; recipes/formats.md has the measured ones.
HQQ_BOUNDS = {
    2: {32: 0.42, 64: 0.48, 128: 0.54},
    3: {32: 0.18, 64: 0.21, 128: 0.24},
    4: {32: 0.085, 64: 0.10, 128: 0.115},
    8: {32: 0.0055, 64: 0.0062, 128: 0.007},
}
BOUNDS = {"nf4": 0.097, "nf4_dq": 0.098, "fp4": 0.13, "fp4_dq": 0.131, "int8": 0.011, "bf16": 0.002}

# By code. NF4: QLoRA (arXiv 2305.14314), appendix E; FP4: sign, two bits of exponent, one of
# mantissa, as bitsandbytes numbers them, twelfths.
FP4 = [value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
VALUES = {
    "nf4": [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    "fp4": FP4 + [-value for value in FP4],
}


def relative_error(name: str, weights: list[torch.Tensor]) -> float:
    """Frobenius error of a layer that went through a format's flat bytes."""
    store, _ = tiny.quantized_store(name, weights)
    off = [store.weight(i, torch.float32) - weight.float() for i, weight in enumerate(weights)]
    total = sum(float(weight.float().square().sum()) for weight in weights)
    error = sum(float(difference.square().sum()) for difference in off)
    return (error / total) ** 0.5


def test_every_format_stays_below_its_error_bound(tmp_path):
    """Through the flat bytes of a layer; half the bound would be refused."""
    pytest.importorskip("hqq")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    path = tiny.save_model(tmp_path / "model", **sizes)
    info = arch.read(str(path), need_weights=True)
    names = [f"{info.layers_prefix}.0.{linear.name}.weight" for linear in info.linears]
    weights = list(Weights(info).read_ahead(names, torch.device(tiny.DEVICE)))
    for name, row in FORMATS.items():
        error = relative_error(name, weights)
        bound = BOUNDS.get(name) or HQQ_BOUNDS[row.weight_bits][row.group_size]
        assert bound / 2 < error < bound, (name, error)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_4_bit_weight_decodes_as_the_papers_say(name):
    """Own arithmetic in float64: two codes a byte, high one first, times the block's largest."""
    weight_OI = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    row = quantize.FORMATS[name]
    fields = row.quantize(weight_OI.to(tiny.DEVICE))
    codes = torch.stack([fields["weight"] >> 4, fields["weight"] & 15], 1).view(-1, 64).long().cpu()
    blocks = weight_OI.view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True).double()
    decoded = torch.tensor(VALUES[name]).double()[codes] * largest
    found = row.dequantize(
        fields.pop("weight"), row.constants(fields), weight_OI.shape, torch.float32
    )
    assert torch.equal(found.cpu().view(-1, 64), decoded.float())
    off = (torch.tensor(VALUES[name]).double() * largest[..., None] - blocks[..., None]).abs()
    assert ((decoded - blocks).abs() - off.amin(-1)).max() < 1e-5  # the nearest of the 16


def test_kernels_may_read_every_field_by_its_address():
    """bitsandbytes gives one offset for all constants; expanded it is one number, not one each."""
    pytest.importorskip("hqq")
    weight_OI = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    for name in FORMATS:
        fields = quantize.FORMATS[name].quantize(weight_OI)
        assert [key for key, field in fields.items() if not field.is_contiguous()] == [], name
