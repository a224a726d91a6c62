"""The 4-bit store: bytes, layouts and the fused product."""

import dataclasses

import pytest
import torch

from fsdp_qlora.model import packed
from tests import tiny

SHAPES = [(192, 128), (64, 128), (128, 320), (576, 576)]
FORMATS = ["nf4", "nf4_dq", "fp4", "fp4_dq", "hqq4", "bf16"]


@pytest.fixture(autouse=True)
def host_by_default():
    yield
    torch.set_default_device("cpu")


def _pack_all(format_name, weights):
    layout = packed.build_layout([tuple(w.shape) for w in weights], format_name)
    flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=tiny.DEVICE)
    for index, weight in enumerate(weights):
        packed.pack_linear(flat, layout, index, weight.to(tiny.DEVICE))
    owner = torch.nn.Module()
    owner.packed = torch.nn.Parameter(flat.view(torch.float32), requires_grad=False)
    return packed.LayerStore(owner, layout, packed.ConstantsCache()), flat


@pytest.mark.parametrize("format_name", FORMATS)
def test_store_returns_the_bits_of_the_library(format_name):
    """Reference: bitsandbytes' and hqq's own dequantisation."""
    tiny.require(format_name)
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    store, _ = _pack_all(format_name, weights)
    for index in (2, 0, 3, 1):
        expected = tiny.dequantized(weights[index], format_name)
        assert torch.equal(store.weight(index, torch.float32).cpu(), expected)


@pytest.mark.parametrize("format_name", FORMATS)
def test_store_survives_a_change_of_its_parameter(format_name):
    """FSDP may hand out another gathered tensor: nothing of the old one may be used."""
    tiny.require(format_name)
    torch.manual_seed(0)
    weights = [torch.randn(128, 128)]
    store, flat = _pack_all(format_name, weights)
    first = store.weight(0, torch.float32).clone()
    copy = flat.clone()
    flat.zero_()
    store.owner.packed = torch.nn.Parameter(copy.view(torch.float32), requires_grad=False)
    assert torch.equal(store.weight(0, torch.float32), first)


def test_layout_has_the_bytes_of_the_formula():
    """NF4 with double quantisation: 0.5 + 1/64 + 8/16384 bytes a weight.

    (One offset per nested block is ours.)
    """
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    num_weights = sum(o * i for o, i in shapes)
    assert packed.build_layout(shapes, "nf4_dq").nbytes == num_weights * (
        1 / 2 + 1 / 64 + 8 / 16384
    )
    assert packed.build_layout(shapes, "nf4").nbytes == num_weights * (1 / 2 + 4 / 64)
    assert packed.build_layout(shapes, "hqq4").nbytes == num_weights * (1 / 2 + 4 / 64)
    assert packed.build_layout(shapes, "bf16").nbytes == num_weights * 2


def test_constants_are_made_once_per_pass_over_a_layer():
    store, _ = _pack_all("nf4_dq", [torch.randn(128, 128) for _ in range(3)])
    calls, real = [], store.format.constants
    store.format = dataclasses.replace(
        store.format, constants=lambda *args: calls.append(1) or real(*args)
    )
    for index in range(3):
        store.weight(index, torch.float32)
    assert len(calls) == 1


def test_fused_product_has_the_gradients_of_plain_autograd():
    """Reference: float64 autograd over the dequantised weight."""
    torch.set_default_device(tiny.DEVICE)
    torch.manual_seed(0)
    weight, bias = torch.randn(192, 128), torch.randn(192)
    store, _ = _pack_all("nf4_dq", [weight])
    linear = torch.nn.Linear(128, 192)
    linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    module = packed.PackedLinear(linear, store, 0)
    x = torch.randn(2, 7, 128, requires_grad=True)
    a, b = torch.randn(4, 128, requires_grad=True), torch.randn(192, 4, requires_grad=True)
    module.lora = (a, b, 0.5, 0.0)
    out = module(x)
    grads = torch.autograd.grad(out.square().sum(), (x, a, b))

    double = [t.detach().double().requires_grad_() for t in (x, a, b)]
    full = tiny.dequantized(weight, "nf4_dq").to(tiny.DEVICE).double()
    expected = double[0] @ full.t() + 0.5 * (double[0] @ double[1].t()) @ double[2].t() + bias
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    for got, want in zip(grads, torch.autograd.grad(expected.square().sum(), double), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-3)


def test_checkpointed_layer_skips_its_last_frozen_product(monkeypatch):
    """The LoRA product is the last to save: recomputation stops before the frozen product."""
    torch.set_default_device(tiny.DEVICE)
    torch.manual_seed(0)
    store, _ = _pack_all("nf4", [torch.randn(128, 128), torch.randn(128, 128)])
    layer = torch.nn.Sequential(
        *(packed.PackedLinear(torch.nn.Linear(128, 128, bias=False), store, i) for i in (0, 1))
    )
    body = packed.TrainedLayer(layer)
    body.slots = tuple(packed.LoraSlot(str(i), layer[i], 4, 8, 0.0) for i in (0, 1))
    body.lora = torch.nn.Parameter(torch.randn(sum(n for s in body.slots for n in s.sizes)))
    body.checkpointing = "non_reentrant"
    calls = []
    real = packed.PackedLinear.dequantize
    monkeypatch.setattr(
        packed.PackedLinear,
        "dequantize",
        lambda self, dtype: calls.append(self.index) or real(self, dtype),
    )
    out = body(torch.randn(3, 128, requires_grad=True))
    assert calls == [0, 1]
    out.sum().backward()
    assert calls == [0, 1, 1, 0, 0]  # backward of 1; recomputation of 0, not of 1; backward of 0
