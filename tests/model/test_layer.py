"""The 4-bit store: bytes, layouts and the fused product."""

import dataclasses

import pytest
import torch

from fsdp_qlora.model import quantize as layouts
from tests import tiny

SHAPES = [(192, 128), (64, 128), (128, 320), (576, 576)]  # dequantised one by one for most formats
EVEN_SHAPES = [(128, 128), (64, 256), (256, 128), (128, 384)]  # without gaps: a layer at once
FORMATS = ["nf4", "nf4_dq", "fp4", "fp4_dq", "int8", "hqq4", "bf16"]


@pytest.fixture(autouse=True)
def host_by_default():
    yield
    torch.set_default_device("cpu")


@pytest.mark.parametrize("shapes", [SHAPES, EVEN_SHAPES])
@pytest.mark.parametrize("format_name", FORMATS)
def test_store_returns_the_bits_of_the_library(format_name, shapes):
    """Reference: bitsandbytes' and hqq's own dequantisation."""
    tiny.require(format_name)
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in shapes]
    store, _ = tiny.quantized_store(format_name, weights)
    is_sequential = format_name not in ("hqq4", "int8")
    assert shapes is SHAPES or store.layout.is_contiguous == is_sequential
    for index in (2, 0, 3, 1):
        expected = tiny.dequantized(weights[index], format_name)
        assert torch.equal(store.weight(index, torch.float32).cpu(), expected)


@pytest.mark.parametrize("format_name", FORMATS)
def test_store_survives_a_change_of_its_parameter(format_name):
    """FSDP may hand out another gathered tensor: nothing of the old one may be used."""
    tiny.require(format_name)
    torch.manual_seed(0)
    weights = [torch.randn(128, 128)]
    store, flat = tiny.quantized_store(format_name, weights)
    first = store.weight(0, torch.float32).clone()
    copy = torch.nn.Parameter(flat.view(torch.float32).clone(), requires_grad=False)
    flat.zero_()
    store.read = lambda: copy
    store.cache.clear()  # as another layer does
    assert torch.equal(store.weight(0, torch.float32), first)


def test_layout_has_the_bytes_of_the_formula():
    """NF4 with double quantisation: 0.5 + 1/64 + 8/16384 bytes a weight.

    (One offset per nested block is ours.)
    """
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    num_weights = sum(o * i for o, i in shapes)
    sizes = {"nf4_dq": 1 / 2 + 1 / 64 + 8 / 16384, "nf4": 1 / 2 + 4 / 64, "hqq4": 1 / 2 + 4 / 64}
    sizes |= {"hqq2_g32": 1 / 4 + 4 / 32, "hqq8_g128": 1 + 8 / 128, "hqq3_a0": 7 * 4 / 64 + 4 / 64}
    for name, size in (sizes | {"bf16": 2}).items():
        assert layouts.build_layout(shapes, name).nbytes == num_weights * size, name
    num_rows = sum(rows for rows, _ in shapes)
    assert layouts.build_layout(shapes, "int8").nbytes == num_weights + 4 * num_rows


def watched(shapes, field):
    """A store in NF4, and the calls of a field of its format."""
    store, _ = tiny.quantized_store("nf4_dq", [torch.randn(shape) for shape in shapes])
    calls, (name, fmt) = [], *store.formats.items()
    real = getattr(fmt, field)
    watch = {field: lambda *args: calls.append(1) or real(*args)}
    store.formats[name] = dataclasses.replace(fmt, **watch)
    return store, calls


@pytest.mark.parametrize("shapes", [SHAPES, EVEN_SHAPES])
def test_constants_are_made_once_per_pass_over_a_layer(shapes):
    store, calls = watched(shapes, "constants")
    for index in range(3):
        store.weight(index, torch.float32)
    assert len(calls) == 1


def test_a_small_layer_is_dequantized_once_for_all_its_matmuls():
    store, calls = watched(EVEN_SHAPES, "dequantize")
    for index in (0, 1, 2, 3, 3, 2, 1, 0):  # recomputation, then backward
        store.weight(index, torch.bfloat16)
    assert len(calls) == 1
    store.weight(0, torch.float32)
    assert len(calls) == 2
