"""The errors that formats make, on weights as random initialisation leaves them."""

import pytest
import torch

from fsdp_qlora import arch
from fsdp_qlora.model import format_errors
from fsdp_qlora.model.layout import build_layout
from fsdp_qlora.plan.formats import FORMATS
from tests import tiny

# Largest relative error ||unpacked - weight|| / ||weight|| of normal weights, by bits of HQQ and
# group size, else by name; recipes/formats.md has the measured ones.
HQQ_BOUNDS = {
    2: {32: 0.42, 64: 0.48, 128: 0.54},
    3: {32: 0.18, 64: 0.21, 128: 0.24},
    4: {32: 0.085, 64: 0.10, 128: 0.115},
    8: {32: 0.0055, 64: 0.0062, 128: 0.007},
}
BOUNDS = {"nf4": 0.097, "nf4_dq": 0.098, "fp4": 0.13, "fp4_dq": 0.131, "int8": 0.011, "bf16": 0.002}


def test_every_format_stays_below_its_error_bound(tmp_path):
    """Through the flat bytes of a layer; half the bound would be refused."""
    pytest.importorskip("hqq")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    path = tiny.save_model(tmp_path / "model", **sizes)
    info = arch.read(str(path), need_weights=True)
    shapes = [(linear.out_features, linear.in_features) for linear in info.linears]
    found = list(format_errors.measure(info, list(FORMATS), torch.device(tiny.DEVICE)))
    assert [name for name, _, _ in found] == list(FORMATS)
    for name, bits, error in found:
        row = FORMATS[name]
        bound = BOUNDS.get(name) or HQQ_BOUNDS[row.weight_bits][row.group_size]
        assert bound / 2 < error < bound, (name, error)
        assert bits == build_layout(shapes, name).nbytes * 8 / sum(o * i for o, i in shapes)
