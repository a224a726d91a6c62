"""The errors that formats make, on weights as random initialisation leaves them."""

import pytest
import torch

from fsdp_qlora import arch
from fsdp_qlora.model.weights import Weights
from fsdp_qlora.planning.limits import FORMATS
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
