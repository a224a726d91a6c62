"""Frozen matmuls in 8 bit: near the exact product both ways, and never silently finite."""

import itertools

import pytest
import torch

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import matmul, quantize
from fsdp_qlora.planning import fit
from fsdp_qlora.planning.sizes import setting_for
from tests import ranks, tiny

NUM_IN, SIZES, M = 192, (48, 16, 16), 1030


def make_weight(sizes=SIZES, quant_type="nf4"):
    """(Quantized4 of linears one below the other, what bitsandbytes makes of its bytes)."""
    torch.manual_seed(0)
    weight = torch.randn(sum(sizes), NUM_IN) * torch.rand(sum(sizes), 1)
    fields = quantize.FORMATS[quant_type].quantize(weight.bfloat16().to(tiny.DEVICE))
    table = quantize.values_of(quant_type, fields["weight"].device)
    scales = matmul.row_scales(fields["absmax"], sum(sizes))
    found = matmul.Quantized4(fields["weight"], fields["absmax"], table, scales)
    exact = tiny.dequantized(weight.bfloat16(), quant_type).to(tiny.DEVICE).double()
    return found, exact


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
def test_codes_are_the_weight_to_the_precision_of_e4m3_in_both_layouts(quant_type):
    weight, exact = make_weight(quant_type=quant_type)
    codes, turned = (matmul.weight_codes(weight, way) for way in (False, True))
    assert turned.is_contiguous() and torch.equal(
        turned.t().view(torch.uint8), codes.view(torch.uint8)
    )
    assert codes.float().abs().max() == 448
    off = (codes.double() * weight.scales_O[:, None] - exact).abs()
    # Half a unit in the last of 3 bits; below the smallest normal number, half of that unit.
    assert (off <= exact.abs() / 16 + weight.scales_O[:, None] * 2**-10).all()


class Linear(torch.nn.Module):
    def __init__(self, weight, size):
        super().__init__()
        self.out_features, self.bias, self.group = size, None, None
        self.quantized = lambda: weight


def test_products_and_gradients_are_those_of_float64_but_for_rounding():
    weight, exact_OI = make_weight()
    linears = [Linear(weight, size) for size in SIZES]
    x = torch.randn(M, NUM_IN, device=tiny.DEVICE).bfloat16()
    x[:, 5] *= 60  # an outlier channel
    outs = matmul.products(x, linears)
    for out, product in zip(outs, (x.double() @ exact_OI.t()).split(SIZES, 1), strict=True):
        assert error(out, product) < 0.05
    grads = [torch.randn_like(out) for out in outs]
    expected = torch.cat(grads, 1).double() @ exact_OI
    assert error(matmul.input_gradient(grads, linears), expected) < 0.05


def test_rows_of_nothing_stay_nothing_and_what_is_not_finite_is_not_hidden():
    weight, _ = make_weight()
    linears = [Linear(weight, sum(SIZES))]
    x = torch.randn(M, NUM_IN, device=tiny.DEVICE).bfloat16()
    x[0] = 0
    x[1, 7], x[2, 9] = float("inf"), float("nan")
    (out,) = matmul.products(x, linears)
    grad = torch.randn(M, sum(SIZES), device=tiny.DEVICE).bfloat16()
    grad[:3] = out[:3]
    for found in (out, matmul.input_gradient([grad], linears)):
        assert not found[0].any() and not found[1:3].isfinite().any() and found[3:].isfinite().all()


def test_the_kernels_compute_what_plain_pytorch_does():
    """On a GPU to the bit; Triton's interpreter rounds to 8 bit wrongly, so there in float32."""
    tiny.require_triton()
    from fsdp_qlora.model import triton_kernels

    weight, _ = make_weight((300, 36))
    dtype = matmul.FP8 if tiny.DEVICE == "cuda" else torch.float32
    host = matmul.Quantized4(*[tensor.cpu() for tensor in weight])
    rounded = matmul.weight_codes(host, False)
    for is_turned in (False, True):
        shape = (NUM_IN, 336) if is_turned else (336, NUM_IN)
        out = torch.empty(shape, device=tiny.DEVICE, dtype=dtype)
        triton_kernels.weight_codes(*weight, out, is_turned, 64)
        out = (out.t() if is_turned else out).cpu().to(matmul.FP8)
        assert torch.equal(out.view(torch.uint8), rounded.view(torch.uint8))
    x = torch.randn(9, NUM_IN).bfloat16()
    x[3] = 0
    for factors in (None, torch.rand(NUM_IN)):
        codes, scales = matmul.quantize_rows(x, factors)
        own = None if factors is None else factors.to(tiny.DEVICE)
        found, at = triton_kernels.quantize_rows(x.to(tiny.DEVICE), own, dtype)
        assert torch.equal(found.cpu().to(matmul.FP8).view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(at.cpu(), scales)


def _compare(world, path):
    """Of every way and level: losses of two steps, the gradient norm, the held-out loss after."""
    from fsdp_qlora.data.batches import collate
    from fsdp_qlora.model import shard
    from fsdp_qlora.training import evaluate, loop
    from tests.model.test_shard import make_samples

    rows = make_samples(2 * world.size)[world.rank :: world.size]
    found, grads = {}, {}
    for num, level, way in itertools.product((1, 10**6), ("full", "none"), ("bf16", "fp8")):
        matmul.FP8_TOKENS = num
        flags = (f"--matmul={way}", f"--use_gradient_checkpointing={level == 'full'}")
        model, _, _ = tiny.build(
            path, world, "--precision=bf16", "--double_quant=false", "--lora_dropout=0", *flags
        )
        tiny.fill_lora(model)
        batch = collate(rows)
        before = evaluate.measure(model, None, [batch], world)["loss"]
        loss = loop.token_loss_sum(model.train(), batch, world.device)
        loss.backward()
        whole = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for p in model.parameters()
            if p.grad is not None
        ]
        shard.settle(model)
        grads[num, level, way] = torch.cat([grad.flatten().float() for grad in whole])
        found[num, level, way] = before, loss.item()
    pairs = [(grads[(*at, "bf16")], grads[(*at, "fp8")]) for *at, way in grads if way == "fp8"]
    return found, [torch.cosine_similarity(a, b, 0).item() for a, b in pairs]


def test_a_model_trains_in_8_bit_and_is_evaluated_in_16(tmp_path):
    """Gradients point where those of 16 bit do; few tokens and evaluation are 16 bit to the bit."""
    path = tiny.save_model(tmp_path / "model")
    found, cosines = ranks.run_ranks(_compare, 1, path)[0]
    for num, level in itertools.product((1, 10**6), ("full", "none")):
        (plain, loss), (held_out, own) = (found[num, level, way] for way in ("bf16", "fp8"))
        assert held_out == plain
        assert own == loss if num > 1 else 0 < abs(own - loss) < 0.01 * loss
    assert all(0.99 < cosine < 0.9999 for cosine in cosines[:2])
    assert cosines[2:] == pytest.approx([1, 1], abs=1e-4)


def test_where_it_cannot_serve_it_is_refused():
    for flags in (["--train_type=hqq_lora"], ["--precision=fp32"], ["--quant_type=int8"]):
        with pytest.raises(UserError, match="--matmul fp8: needs a base in nf4 or fp4"):
            config.parse(["--model_name=llama-2-7b", "--matmul=fp8", *flags])


def test_the_plan_knows_their_speed_as_it_was_measured():
    """recipes/measured.md: 1.47x at 70B, 1.32x to 1.38x at 7B; few tokens, a GeForce: nothing."""
    for name, rows, length, gpu, least, most in (
        ("llama-2-70b", 2, 2048, "H200", 1.38, 1.52),
        ("llama-2-7b", 4, 2048, "H200", 1.28, 1.45),
        ("llama-2-7b", 1, 512, "H200", 1, 1),
        ("llama-2-7b", 4, 2048, "3090", 1, 1),
    ):
        flags = f"--model_name={name} --batch_size={rows} --context_length={length} --fit=off"
        machine = hardware.Machine((hardware.GPUS[gpu],), 200.0, 1)
        info, seconds = arch.read(name, need_weights=False), []
        for way in ("bf16", "fp8"):
            cfg = config.parse([*flags.split(), f"--matmul={way}"])
            setting = setting_for(info, cfg, machine)
            seconds.append(fit.evaluate(info, cfg, setting, machine).speed.step_s)
        assert least <= seconds[0] / seconds[1] <= most, name
