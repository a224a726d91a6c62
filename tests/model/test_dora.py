"""DoRA: lengths by Gram matrices, gradients and logits as peft has them, on two real ranks."""

import itertools

import torch

from fsdp_qlora.model import adapters, lora
from tests import tiny
from tests.model.test_shard import CHECKPOINTING, FLAGS, check_gradients, sharded_gradients
from tests.ranks import run_ranks

CASES = [
    *itertools.product(("sharded", "streamed"), CHECKPOINTING, (1,)),
    ("offloaded", "levels", 3),
    ("streamed_resident", "non_reentrant", 1),
]


def test_lengths_by_gram_matrices_equal_those_of_the_dense_sum():
    """Reference: ||W + s B A|| row by row in float64."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((70, 48), (4, 48), (70, 4))
    )
    dense = (weight + 0.7 * b @ a).norm(dim=1)
    got = lora.row_norms((weight**2).sum(1).float(), (weight @ a.t()).float(), a, b, 0.7)
    torch.testing.assert_close(got.double(), dense, rtol=1e-6, atol=0)
    cut = lora.row_squares(weight.repeat(40, 1))
    torch.testing.assert_close(cut.double(), (weight**2).sum(1).repeat(40), rtol=1e-6, atol=0)


def test_gradients_of_the_scaling_equal_those_of_autograd_in_float64():
    """y = m / n * z with n held fixed: by hand, in float64."""
    z, bias = torch.randn(9, 5, dtype=torch.float64, requires_grad=True), torch.randn(5).double()
    gain = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: lora.Rescaled.apply(*x, bias), (z, gain))


def _gradients(world, place, runs):
    """Of each run: the adapter that tiny.fill_lora gives, as peft has it, and gradients by case."""
    found = []
    for flags, _, kind, cases in runs:
        model, _, _ = tiny.build(place / kind, world, *FLAGS, *flags)
        flats = tiny.fill_lora(model)
        adapters.shift_magnitudes(model, flats, 1)
        values = {n: t.numpy() for n, t in tiny.lora_dict(model, flats).items()}
        found.append((values, sharded_gradients(world, place / kind, flags, cases)))
    return found


RUNS = [
    (("--train_type=bnb_dora",), "nf4_dq", "llama", CASES),
    (("--train_type=hqq_dora",), "hqq4", "llama", CASES[::3]),
    # Biases, and linears of a group that have no adapter; 16-bit base.
    (("--train_type=dora", "--lora_target_modules=q_proj,v_proj"), "bf16", "qwen2", CASES[::4]),
]


def test_gradients_equal_those_of_peft(tmp_path):
    """Reference: transformers + peft with use_dora on one process, unsharded, float32."""
    tiny.require("hqq4")
    for kind in ("llama", "qwen2"):
        tiny.save_model(tmp_path / kind, kind, num_hidden_layers=2)
    by_rank = run_ranks(_gradients, 2, tmp_path, RUNS)
    for (flags, format_name, kind, _), *results in zip(RUNS, *by_rank, strict=True):
        assert any(name.endswith("magnitude_vector") for name in results[0][0])
        check_gradients(results, tmp_path / kind, flags, format_name)


def _linear(weight, bias):
    """A packed linear whose store gives `weight`, alone in its group."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
    linear.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    packed = lora.QuantizedLinear(linear, lambda dtype: weight.to(dtype))
    return packed, lora.InputGroup([packed])


def test_dropout_acts_as_in_peft():
    """The base sees x, the change sees x after dropout: one mask for both, as DoraLinearVariant."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(48, 70))
    weight, bias = plain[0].weight.data.clone(), plain[0].bias.data.clone()
    settings = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.4, use_dora=True, target_modules=["0"])
    model = get_peft_model(plain, settings).train()
    named = {n.split(".")[3]: p for n, p in model.named_parameters() if p.requires_grad}
    named["lora_B"].data.normal_(0, 0.1)
    named["lora_magnitude_vector"].data.mul_(1.3)
    x = torch.randn(2, 9, 48, requires_grad=True)
    torch.manual_seed(5)
    want = model(x)
    want.square().sum().backward()
    names = ("lora_A", "lora_B", "lora_magnitude_vector")
    wanted = [x.grad.clone(), *(named[name].grad for name in names)]

    packed, group = _linear(weight, bias)
    square = lora.row_squares(weight)
    values = [named[name].detach().clone() for name in names]
    values[2] -= square.sqrt()
    a, b, change = (value.requires_grad_() for value in values)
    group.adapter = lora.Adapter([packed], a, [b], [1.5], 0.4, [change], [square])
    x.grad = None
    torch.manual_seed(5)
    out = packed(x)
    torch.testing.assert_close(out, want)
    out.square().sum().backward()
    for got, expected in zip([x.grad, a.grad, b.grad, change.grad], wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_it_starts_as_the_base_bit_for_bit_in_16_bit():
    """In bf16 a magnitude itself would be off by 0.4 %; its change is zero."""
    weight, x = torch.randn(70, 48).bfloat16(), torch.randn(3, 48).bfloat16()
    packed, group = _linear(weight, None)
    square, a = lora.row_squares(weight), torch.randn(4, 48).bfloat16()
    b, change = torch.zeros(70, 4).bfloat16(), torch.zeros(70).bfloat16()
    group.adapter = lora.Adapter([packed], a, [b], [2.0], 0.0, [change], [square])
    assert packed(x).equal(x @ weight.t())
