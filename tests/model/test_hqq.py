"""HQQ in every number of bits, group size and axis: the bytes and the bits of hqq itself."""

import itertools

import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.model import quantize
from fsdp_qlora.planning.sizes import FORMATS
from tests import tiny

NAMES = [name for name in FORMATS if name.startswith("hqq")]
SHAPES = [(64, 128), (128, 192), (32, 256)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def weights() -> list[torch.Tensor]:
    pytest.importorskip("hqq")
    torch.manual_seed(0)
    return [torch.randn(shape) * 0.05 for shape in SHAPES]


def test_each_combination_of_flags_has_its_row():
    """And a wrong one, or one for another base, is refused."""
    found = set()
    for bits, group_size, axis in itertools.product((2, 3, 4, 8), (32, 64, 128), (0, 1)):
        argv = [f"--n_bits={bits}", f"--group_size={group_size}", f"--hqq_axis={axis}"]
        name = config.parse(["--train_type=hqq_lora", *argv]).format_name
        row = FORMATS[name]
        assert (row.weight_bits, row.group_size, row.axis) == (bits, group_size, axis)
        found.add(name)
    assert found == set(NAMES) and len(found) == 24
    for argv in (["--n_bits=5"], ["--group_size=48"], ["--hqq_axis=2"]):
        with pytest.raises(config.cli.UserError):
            config.parse(["--train_type=hqq_lora", *argv])
    with pytest.raises(config.cli.UserError, match="belongs to an HQQ base"):
        config.parse(["--train_type=qlora", "--group_size=32"])


@pytest.mark.parametrize("format_name", NAMES)
def test_unpacked_weights_have_the_bits_of_hqq(weights, format_name: str):
    """In every compute dtype, through the flat bytes of a layer."""
    store, _ = tiny.quantized_store(format_name, weights)
    for dtype, (index, weight) in itertools.product(DTYPES, enumerate(weights)):
        expected = tiny.hqq_round_trip(weight.to(tiny.DEVICE), format_name, dtype)
        assert torch.equal(store.weight(index, dtype), expected), (dtype, index)


def test_the_kernel_has_the_bits_of_plain_torch():
    """On a card as it is; elsewhere by Triton's interpreter, where Triton is installed.

    The interpreter cuts a bfloat16 off instead of rounding it: there it gets numbers that are exact
    in it. The order of rounding is seen in float16.
    """
    is_interpreted = tiny.DEVICE == "cpu"
    tiny.require_triton()
    from fsdp_qlora.model import triton_kernels

    torch.manual_seed(0)
    for name, dtype, num_weights in itertools.product(NAMES, DTYPES, (64 * 128, 160 * 128)):
        row = FORMATS[name]
        cols = row.group_size if row.axis else num_weights // row.group_size
        packed = torch.randint(0, 256, (row.weight_bytes((num_weights, 1)),), dtype=torch.uint8)
        kept = dtype if dtype == torch.float16 else getattr(torch, row.fields[0].dtype)
        zero = torch.rand(num_weights // row.group_size).mul(2**row.weight_bits).to(kept)
        scale = torch.rand_like(zero.float()).to(kept)
        if is_interpreted and dtype == torch.bfloat16:
            zero, scale = zero.mul_(4).floor_().div_(4), scale.mul_(4).ceil_().exp2_()
            zero = zero.floor() if row.weight_bits == 8 else zero
        dequantize = quantize.FORMATS[name].dequantize
        expected = dequantize(packed, (zero, scale), (num_weights // cols, cols), dtype)
        words = packed.view(torch.int32 if row.weight_bits == 3 else torch.uint8).view(-1, cols)
        args = [tensor.to(tiny.DEVICE) for tensor in (words, zero, scale)]
        out = torch.full_like(expected, float("nan"), device=tiny.DEVICE)
        math_dtype = torch.promote_types(dtype, kept)
        triton_kernels.dequantize_hqq(*args, out, row.weight_bits, row.axis, math_dtype)
        assert torch.equal(out.cpu(), expected), (name, dtype, num_weights)


def test_what_hqq_cannot_pack_is_refused():
    pytest.importorskip("hqq")
    with pytest.raises(quantize.UserError, match="whole groups of 64"):
        quantize.FORMATS["hqq4"].quantize(torch.zeros(3, 64))
