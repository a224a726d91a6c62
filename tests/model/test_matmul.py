"""Frozen matmuls in 8 bit: near the exact product both ways, and never silently finite."""

import dataclasses

import pytest
import torch

from fsdp_qlora import arch, config, hardware
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import matmul, quantize, skeleton
from fsdp_qlora.planning import fit, run
from fsdp_qlora.planning.sizes import setting_for
from tests import ranks, tiny

NUM_IN, SIZES, M = 192, (48, 16, 16), 1030
WAYS = pytest.mark.parametrize("way", ("fp8", "int8"))


def make_weight(way, sizes=SIZES, quant_type="nf4"):
    """(Quantized4 of linears one below the other, what bitsandbytes makes of its bytes)."""
    torch.manual_seed(0)
    weight = torch.randn(sum(sizes), NUM_IN) * torch.rand(sum(sizes), 1)
    fields = quantize.FORMATS[quant_type].quantize(weight.bfloat16().to(tiny.DEVICE))
    table = quantize.values_of(quant_type, fields["weight"].device)
    code = matmul.CODES[way]
    scales = matmul.row_scales(fields["absmax"], sum(sizes), code)
    found = matmul.Quantized4(fields["weight"], fields["absmax"], table, scales, code)
    exact = tiny.dequantized(weight.bfloat16(), quant_type).to(tiny.DEVICE).double()
    return found, exact


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@WAYS
@pytest.mark.parametrize("quant_type", ("nf4", "fp4"))
def test_codes_are_the_weight_to_the_precision_of_8_bit_in_both_layouts(way, quant_type):
    weight, exact = make_weight(way, quant_type=quant_type)
    codes, turned = (matmul.weight_codes(weight, way) for way in (False, True))
    assert turned.is_contiguous() and torch.equal(
        turned.t().view(torch.uint8), codes.view(torch.uint8)
    )
    assert codes.float().abs().max() == (448 if way == "fp8" else 127)
    off = (codes.double() * weight.scales_O[:, None] - exact).abs()
    # Half a unit in the last of 3 bits; below the smallest normal number, half of that unit. In
    # int8 half a unit, and what is exact here is so in bfloat16.
    relative, units = (2**-4, 2**-10) if way == "fp8" else (2**-8, 0.501)
    assert (off <= exact.abs() * relative + weight.scales_O[:, None] * units).all()


class Linear(torch.nn.Module):
    def __init__(self, weight, size):
        super().__init__()
        self.out_features, self.bias, self.group = size, None, None
        self.quantized = lambda: weight


@WAYS
def test_products_and_gradients_are_those_of_float64_but_for_rounding(way):
    weight, exact_OI = make_weight(way)
    linears, most = [Linear(weight, size) for size in SIZES], 0.05 if way == "fp8" else 0.012
    x = torch.randn(M, NUM_IN, device=tiny.DEVICE).bfloat16()
    x[:, 5] *= 60  # an outlier channel, of no weight: what it costs the others shows
    linears[1].bias = torch.randn(SIZES[1], device=tiny.DEVICE).bfloat16()
    weight.codes.view(-1, NUM_IN // 2)[:, 2] = 0x77  # NF4's zero
    exact_OI[:, 4:6] = 0
    pair = torch.randn(M, 4), torch.randn(SIZES[1], 4)
    pair = tuple(part.to(tiny.DEVICE).bfloat16() for part in pair)
    outs = matmul.products(x, linears, {linears[1]: (*pair, 0.3)})
    products = list((x.double() @ exact_OI.t()).split(SIZES, 1))
    products[1] += 0.3 * pair[0].double() @ pair[1].double().t() + linears[1].bias.double()
    for out, product in zip(outs, products, strict=True):
        assert error(out, product) < most
    grads = [torch.randn_like(out) for out in outs]
    expected = torch.cat(grads, 1).double() @ exact_OI
    assert error(matmul.input_gradient(grads, linears), expected) < most


@WAYS
def test_rows_of_nothing_stay_nothing_and_what_is_not_finite_is_not_hidden(way):
    weight, _ = make_weight(way)
    linears = [Linear(weight, sum(SIZES))]
    x = torch.randn(M, NUM_IN, device=tiny.DEVICE).bfloat16()
    x[0] = 0
    x[1, 7], x[2, 9] = float("inf"), float("nan")
    (out,) = matmul.products(x, linears, {})
    grad = torch.randn(M, sum(SIZES), device=tiny.DEVICE).bfloat16()
    grad[:3] = out[:3]
    for found in (out, matmul.input_gradient([grad], linears)):
        assert not found[0].any() and not found[1:3].isfinite().any() and found[3:].isfinite().all()


def test_sums_in_fp16_are_near_those_of_float64_and_what_is_beyond_them_is_not_finite():
    """Rows far from one another in size, a total that is added to, a sum beyond 65,504."""
    torch.manual_seed(0)
    x = torch.randn(40, 500).bfloat16() * 10.0 ** torch.arange(-20, 20)[:, None]
    x, weight = x.bfloat16().to(tiny.DEVICE), torch.randn(500, 30, device=tiny.DEVICE).half() / 50
    x[3], exact = 0, x.double() @ weight.double()
    exact[3] = 0
    found = matmul.plus_product(None, x, weight)
    norms = exact.norm(dim=1).clamp_min(1e-30)
    assert found.dtype == torch.bfloat16 and not found[3].any()
    assert (((found.double() - exact).norm(dim=1) / norms) < 0.005).all()
    total = found.clone()
    assert matmul.plus_product(total, x, weight) is total
    torch.testing.assert_close(total, found * 2)
    x[1, 7], x[2, 9], weight[:, 0] = float("inf"), float("nan"), 60000
    x[4] = 1
    found = matmul.plus_product(None, x, weight)
    assert not found[1:3].isfinite().any() and found[5:, 1:].isfinite().all()
    assert not found[4, 0].isfinite()


@WAYS
def test_the_kernels_compute_what_plain_pytorch_does(way):
    """Codes to the bit; Triton's interpreter rounds to e4m3 wrongly, so there in float32."""
    tiny.require_triton()
    from fsdp_qlora.model import triton_kernels

    weight, _ = make_weight(way, (300, 36))
    code = weight.code
    dtype = torch.float32 if way == "fp8" and tiny.DEVICE != "cuda" else code.dtype
    host = matmul.Quantized4(*[tensor.cpu() for tensor in weight[:4]], code)
    rounded = matmul.weight_codes(host, False)
    for is_turned in (False, True):
        shape = (NUM_IN, 336) if is_turned else (336, NUM_IN)
        out = torch.empty(shape, device=tiny.DEVICE, dtype=dtype)
        triton_kernels.weight_codes(*weight[:4], out, is_turned)
        out = (out.t() if is_turned else out).cpu().to(code.dtype)
        assert torch.equal(out.view(torch.uint8), rounded.view(torch.uint8))
    x = torch.randn(9, 5000).bfloat16()  # more than one tile of the kernel's
    x[3] = 0
    factors = torch.rand(5000)
    one, two = x.split((20, 4980), 1), x.split((20, 7, 4973), 1)
    for parts, own in (([x], None), ([x], factors), (one, factors), (two, factors)):
        if code.block and len(parts) > 1:
            continue
        codes, scales = matmul.quantize_rows([x], code, own)
        parts = [part.contiguous().to(tiny.DEVICE) for part in parts]
        own = None if own is None else own.to(tiny.DEVICE)
        rows = triton_kernels.quantize_rows(parts, own, dtype, *code[1:3])
        assert torch.equal(rows[0].cpu().to(code.dtype).view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(rows[1].cpu(), scales)


def test_lora_is_added_as_by_plain_pytorch():
    """Ragged tiles, a few columns of a wider matrix, a right side that is turned."""
    tiny.require_triton()
    from fsdp_qlora.model import triton_kernels

    torch.manual_seed(0)
    total, hidden, high = (torch.randn(*size) for size in ((70, 200), (70, 9), (200, 5)))
    expected = total + 0.7 * hidden[:, 3:8] @ high.t()
    out = total.to(tiny.DEVICE)
    triton_kernels.add_product(out, hidden.to(tiny.DEVICE)[:, 3:8], high.to(tiny.DEVICE).t(), 0.7)
    torch.testing.assert_close(out.cpu(), expected)


@pytest.mark.parametrize("sizes", ((300, 80, 192), (130, 300, 320)))
def test_the_int8_kernel_sums_up_what_plain_pytorch_does(sizes):
    """Ragged tiles, a last block that is not full, bias and LoRA; bfloat16 is cut off there."""
    tiny.require_triton()
    from fsdp_qlora.model import triton_kernels

    torch.manual_seed(0)
    (m, n, k), code = sizes, matmul.CODES["int8"]
    x = matmul.quantize_rows([torch.randn(m, k).bfloat16()], code)
    codes, scales = matmul.quantize_rows([torch.randn(n, k).bfloat16()], code._replace(block=0))
    left = x[0].double() * x[1].repeat_interleave(matmul.BLOCK, 1)[:, :k]
    exact = left @ (codes * scales).double().t()
    low, high, bias = torch.randn(m, 40), torch.randn(n, 40), torch.randn(n)
    at = tiny.DEVICE  # scales of a block lie together, as quantize_rows of the kernels has them
    pairs = (x[0].to(at), x[1].t().contiguous().t().to(at)), (codes.to(at), scales[:, 0].to(at))
    for rest in ((None, None), (bias.to(at), (low.to(at), high.to(at), 0.5))):
        found = triton_kernels.int8_matmul(*pairs, *rest).cpu().double()
        assert ((found - exact).abs() <= exact.abs() * 2**-7 + 1e-3).all()
        exact += bias + 0.5 * low.double() @ high.double().t()


def _compare(world, path):
    """Of every way and level: losses of two steps, the gradient norm, the held-out loss after."""
    from fsdp_qlora.data.batches import collate
    from fsdp_qlora.model import shard
    from fsdp_qlora.training import evaluate, losses
    from tests.model.test_shard import make_samples

    rows = make_samples(2 * world.size)[world.rank :: world.size]
    found = {}
    rows_of_cases = (
        (1, "full", "qlora", "fp8 int8 fp16"),
        (1, "none", "qlora", "fp8 int8 fp16"),
        (10**6, "full", "qlora", "fp8"),
        (1, "full", "hqq_lora", "int8 fp16"),
    )
    cases = [(*row[:3], way) for row in rows_of_cases for way in ("auto", *row[3].split())]
    for num, level, train_type, way in cases:
        matmul.MIN_TOKENS_8_BIT = num
        flags = (f"--matmul={way}", f"--use_gradient_checkpointing={level == 'full'}")
        flags += (f"--train_type={train_type}", *["--double_quant=false"] * (train_type == "qlora"))
        model, _, _ = tiny.build(path, world, "--precision=bf16", "--lora_dropout=0", *flags)
        tiny.fill_lora(model)
        batch = collate(rows)
        before = evaluate.measure(model, None, [batch], world)["loss"]
        loss = losses.token_loss_sum(model.train(), batch, world.device)
        loss.backward()
        whole = [
            p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for p in model.parameters()
            if p.grad is not None
        ]
        shard.settle(model)
        grad = torch.cat([grad.flatten().float() for grad in whole])
        if way == "auto":
            plain = before, loss.item(), grad
            continue
        cosine = torch.cosine_similarity(plain[2], grad, 0).item()
        found[num, level, train_type, way] = *plain[:2], before, loss.item(), cosine
    return found


def test_a_model_trains_in_8_bit_and_is_evaluated_in_16(tmp_path):
    """Gradients point where those of 16 bit do; few tokens and evaluation are 16 bit to the bit."""
    path = tiny.save_model(tmp_path / "model")
    for (num, *_), case in ranks.run_ranks(_compare, 1, path)[0].items():
        plain, loss, held_out, own, cosine = case
        assert held_out == plain
        assert own == loss if num > 1 else 0 < abs(own - loss) < 0.01 * loss
        assert 0.99 < cosine < 0.99999 if num == 1 else cosine == pytest.approx(1, abs=1e-4)


def test_where_it_cannot_serve_it_is_refused(monkeypatch):
    for flags in (["--train_type=lora"], ["--precision=fp32"], ["--quant_type=int8"]):
        for way in ("fp8", "int8", "fp16"):
            with pytest.raises(UserError, match=f"--matmul {way}: needs a base in nf4, fp4 or HQQ"):
                config.parse(["--model_name=llama-2-7b", f"--matmul={way}", *flags])
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    for way, majors in (*skeleton.MAJORS.items(), ("auto", range(7, 13))):
        cfg = config.parse(["--model_name=llama-2-7b", f"--matmul={way}", "--liger=off"])
        for major in range(7, 13):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, at=major: (at, 0))
            if major in majors:
                assert skeleton.choose_kernels(cfg, gpu, "").matmul == way.replace("auto", "bf16")
                continue
            with pytest.raises(UserError, match=f"--matmul {way}: GPU gains nothing by it"):
                skeleton.choose_kernels(cfg, gpu, "")


def test_auto_is_the_fastest_that_was_measured_where_it_can_serve():
    """int8 is predicted on most GPUs; a run that was recorded as auto was one in bf16.

    Of several machines the least counts.
    """
    info = arch.read("llama-2-7b", need_weights=False)
    cases = {("H200", "qlora"): "fp8", ("2xH100", "hqq_lora"): "fp8", ("H200", "lora"): "bf16"}
    cases |= {("H200+A100-80", "qlora"): "bf16", ("2x4090", "qlora"): "bf16"}
    cases |= {("T4", "qlora"): "bf16", ("none", "qlora"): "bf16"}
    for (gpus, train_type), way in cases.items():
        cfg = config.parse([f"--train_type={train_type}", "--matmul=auto", "--output_dir=o"])
        machine = hardware.Machine(tuple(hardware.parse_gpus(gpus)), 64)
        plan = run.make(info, cfg, frozenset({"matmul"}), machine)
        assert plan.cfg.matmul == way and plan.note.endswith(f"; matmul {way}"), gpus
        assert ("precision fp16_autocast" in plan.note) == (gpus == "T4")
    seen = {"int8_gain": 2.2, "fp16_gain": 3.0, "measured_gains": "int8_gain fp16_gain"}
    known = hardware.Machine((dataclasses.replace(hardware.GPUS["3090"], **seen),) * 2, 64)
    slow = hardware.Machine((dataclasses.replace(known.gpus[0], int8_gain=0.9),), 64)
    new = hardware.Machine((hardware.GPUS["3090"],), 64)
    cfg = config.parse(["--matmul=auto", "--output_dir=o"])
    for machines, way in (([known], "int8"), ([known, slow], "bf16"), ([known, new], "bf16")):
        plan = run.make(info, cfg, frozenset({"matmul"}), hardware.least_of(machines))
        assert plan.cfg.matmul == way
    assert config.from_record({"matmul": "auto"})[0].matmul == "bf16"


def test_the_plan_knows_their_speed_as_it_was_measured():
    """recipes/measured.md: 1.47x at 70B, 1.17x to 1.38x at 7B; few tokens, a GeForce: nothing."""
    for name, rows, length, gpu, ways, least, most in (
        ("llama-2-70b", 2, 2048, "H200", "bf16 fp8", 1.38, 1.52),
        ("llama-2-7b", 4, 2048, "H200", "bf16 fp8", 1.17, 1.38),
        ("llama-2-7b", 1, 512, "H200", "auto fp8", 1, 1),
        ("llama-2-7b", 4, 2048, "3090", "bf16 fp8", 1, 1),
        ("llama-2-7b", 4, 2048, "3090", "bf16 int8", 1.6, 2.5),
        ("llama-2-7b", 4, 2048, "H200", "bf16 int8", 0.9, 1.1),
        ("llama-2-7b", 4, 2048, "3090", "bf16 fp16", 1.3, 1.7),
        ("llama-2-7b", 4, 2048, "H200", "bf16 fp16", 1, 1),
        ("llama-2-7b", 4, 2048, "2080Ti", "auto int8", 1, 1),
    ):
        flags = f"--model_name={name} --batch_size={rows} --context_length={length} --fit=off"
        machine = hardware.Machine((hardware.GPUS[gpu],), 200.0, 1)
        info, found = arch.read(name, need_weights=False), []
        for way in ways.split():
            cfg = config.parse([*flags.split(), f"--matmul={way}"])
            setting = setting_for(info, cfg, machine)
            found.append(fit.evaluate(info, cfg, setting, machine))
        first, second = found
        assert least <= first.speed.step_s / second.speed.step_s <= most, name
        # In float16 there are an input and a sum of 4 x 2048 tokens more, of 4096 and 11008.
        more = 4 * 2048 * (4096 + 11008) * 2 / hardware.GIB * (way == "fp16")
        assert more <= second.device.peak_gib - first.device.peak_gib <= 1.4 * more
