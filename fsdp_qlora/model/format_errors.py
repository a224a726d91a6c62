"""How far each base format is from the 16-bit weights, and how many bytes it needs: a table."""

import argparse
from collections.abc import Iterator

import torch

from fsdp_qlora import arch
from fsdp_qlora.model.layout import build_layout, pack_linear
from fsdp_qlora.model.packed import LayerCache, LayerStore
from fsdp_qlora.model.quantize import FORMATS
from fsdp_qlora.model.weights import Weights

USAGE = "Measures every base format on the linears of a model's first, middle and last layer."


def measure(
    info: arch.ModelInfo, names: list[str], device: torch.device
) -> Iterator[tuple[str, float, float]]:
    """Pack and unpack real weights.

    Args:
        info: the model, with its tensors.
        names: rows of FORMATS.
        device: where it is done.

    Yields:
        Name, bits of a weight with its constants and padding, and the relative error
        ||unpacked - weight|| / ||weight|| (Frobenius) over all these linears, in float32.
    """
    shapes = [(linear.out_features, linear.in_features) for linear in info.linears]
    tensors = [
        f"{info.layers_prefix}.{layer}.{linear.name}.weight"
        for layer in sorted({0, info.num_layers // 2, info.num_layers - 1})
        for linear in info.linears
    ]
    weights = list(Weights(info).read_ahead(tensors, device))
    total = sum(float(weight.float().square().sum()) for weight in weights)
    for name in names:
        layout, error = build_layout(shapes, name), 0.0
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        store = LayerStore(flat.detach, layout, LayerCache())
        for number, weight in enumerate(weights):
            index = number % len(shapes)
            pack_linear(flat, layout, index, weight)
            store.cache.clear()
            off = store.weight(index, torch.float32) - weight.float()
            error += float(off.square().sum())
        yield name, layout.nbytes * 8 / layout.num_weights, (error / total) ** 0.5


def main(argv: list[str]) -> int:
    """The verb `formats`."""
    parser = argparse.ArgumentParser(prog="python -m fsdp_qlora formats", description=USAGE)
    parser.add_argument("--model_name", required=True, help="a directory or hub name")
    parser.add_argument("--formats", default=" ".join(FORMATS), help="which, between spaces")
    args = parser.parse_args(argv)
    info = arch.read(args.model_name, need_weights=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{'format':<14}{'bits a weight':>14}{'relative error':>16}")
    for name, bits, error in measure(info, args.formats.split(), device):
        print(f"{name:<14}{bits:>14.2f}{error:>16.4f}", flush=True)
    return 0
