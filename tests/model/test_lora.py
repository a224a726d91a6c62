"""Linears with adapters: products, gradients, what is computed and what is not."""

import pytest
import torch
from torch import nn

from fsdp_qlora.model import layer as layers
from fsdp_qlora.model import lora as linears
from tests import tiny

DIM = 128


@pytest.fixture(autouse=True)
def on_the_device_of_ranks():
    torch.set_default_device(tiny.DEVICE)
    torch.manual_seed(0)
    yield
    torch.set_default_device("cpu")


class Layer(nn.Module):
    """A decoder layer's products without attention: two that share an input, one, one."""

    def __init__(self, last=nn.Identity):
        super().__init__()
        names = ("gate_proj", "up_proj", "o_proj", "down_proj")
        for name in names:
            setattr(self, name, nn.Linear(DIM, DIM, bias=name == "up_proj"))
        self.last = last()

    def forward(self, x):
        mixed = self.o_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return x + self.last(self.down_proj(mixed))


def build(last=nn.Identity, targets=("gate_proj", "up_proj", "o_proj", "down_proj"), dropout=0.0):
    """(body, the same layer in float64 as plain autograd has it, calls of dequantize)."""
    layer, calls = Layer(last).requires_grad_(False), []
    plain = Layer(last).double()
    names = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    store, _ = tiny.quantized_store("nf4", [getattr(layer, name).weight.data for name in names])
    replaced = {}
    for index, name in enumerate(names):
        old = getattr(layer, name)
        weight = tiny.dequantized(old.weight.data, "nf4").to(tiny.DEVICE).double()
        getattr(plain, name).weight.data = weight
        if old.bias is not None:
            plain.get_submodule(name).bias.data = old.bias.double()

        def dequantize(dtype, index=index):
            calls.append(names[index])
            return store.weight(index, dtype)

        replaced[name] = linears.QuantizedLinear(old, dequantize)
        setattr(layer, name, replaced[name])
    body = layers.TrainedLayer(layer, linears.group_linears(replaced), store)
    slots = [linears.LoraSlot(n, replaced[n], 4, 2, dropout) for n in names if n in targets]
    body.lora = nn.Parameter(torch.randn(body.set_slots(slots) + 3) * 0.3)
    return body, plain, calls


def reference(body, plain, x):
    """Output and gradients of x and of every (A, B), by float64 autograd."""
    x = x.detach().double().requires_grad_()
    pairs = [(a.double(), b.double()) for a, b in body.split_lora(body.lora.detach())]
    pairs = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in pairs]
    for slot, (a, b) in zip(body.slots, pairs, strict=True):
        linear = plain.get_submodule(slot.name)
        linear.register_forward_hook(
            lambda _, args, out, a=a, b=b, s=slot.scale: out + s * (args[0] @ a.t()) @ b.t()
        )
    out = plain(x)
    out.square().sum().backward()
    return out, x.grad, [(a.grad, b.grad) for a, b in pairs]


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("level", ["full", "selective", "none"])
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj", "o_proj", "down_proj"), ("up_proj",)])
@pytest.mark.parametrize("last", [nn.Identity, nn.Tanh])
def test_gradients_are_those_of_plain_autograd(level, is_reentrant, targets, last):
    """Reference: float64 over the dequantised weights.

    Tanh saves what the last product returns: its recomputation may then not be skipped.
    """
    body, plain, _ = build(last, targets)
    body.level, body.is_reentrant = level, is_reentrant
    x = torch.randn(2, 7, DIM)
    want, want_x, want_pairs = reference(body, plain, x)
    for _ in range(2):  # the second time what the first has found out is used
        x.grad = body.lora.grad = None
        got = body(x.requires_grad_())
        got.square().sum().backward()
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(x.grad.double(), want_x, rtol=1e-4, atol=1e-3)
        for pair, want_pair in zip(body.split_lora(body.lora.grad), want_pairs, strict=True):
            for grad, want_grad in zip(pair, want_pair, strict=True):
                torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize(
    ("level", "last", "again"),
    [
        ("full", nn.Identity, ["gate_proj", "up_proj", "o_proj"]),  # not down_proj
        ("full", nn.Tanh, ["gate_proj", "up_proj", "o_proj", "down_proj"]),
        ("selective", nn.Identity, []),
        ("none", nn.Identity, []),
    ],
)
def test_recomputation_makes_only_the_products_that_gradients_need(level, last, again):
    body, _, calls = build(last)
    body.level = level
    forward = ["gate_proj", "up_proj", "o_proj", "down_proj"]
    backward = ["down_proj", "o_proj", "gate_proj", "up_proj"]
    for is_known in (False, True):  # the first recomputation looks whether the last may be skipped
        calls.clear()
        out = body(torch.randn(3, DIM, requires_grad=True))
        assert calls == forward
        out.sum().backward()
        is_made = not is_known and level != "none" and "down_proj" not in again
        assert calls == [*forward, *again, *["down_proj"] * is_made, *backward]


def test_linears_that_share_an_input_read_it_together_and_only_then():
    body, _, _ = build()
    gate, up = body.layer.gate_proj, body.layer.up_proj
    assert gate.group is up.group
    assert body.layer.o_proj.group.linears == (body.layer.o_proj,)
    x, other = torch.randn(5, DIM), torch.randn(5, DIM)
    apart = gate(x), up(other)
    torch.testing.assert_close(apart[1], up(other), rtol=0, atol=0)
    torch.testing.assert_close(apart[0], gate(x), rtol=0, atol=0)


def test_recomputation_draws_the_dropout_of_the_forward_pass(monkeypatch):
    """Reference: the same seed without recomputation, forward and backward; of long rows too."""
    grads = []
    for level, long in (("none", 9), ("full", 9), ("selective", 9), ("none", 5), ("full", 5)):
        monkeypatch.setattr(linears, "LONG_TOKENS", long)
        torch.manual_seed(1)
        body, _, _ = build(dropout=0.5)
        body.level = level
        torch.manual_seed(2)
        body(torch.ones(6, DIM)).square().sum().backward()
        torch.rand(3)  # something else draws in between
        grads.append(body.lora.grad)
    for grad in grads[1:]:
        assert torch.equal(grads[0], grad)
