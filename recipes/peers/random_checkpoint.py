"""A 16-bit checkpoint of a known shape with random weights.

It measures loading, and other trainers, where no real model is at hand.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from fsdp_qlora import arch
from fsdp_qlora.errors import UserError
from fsdp_qlora.model.weights import RandomWeights

SHARD_BYTES = 4 * 2**30


def all_shapes(info: arch.ModelInfo) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a model's files, in order of layers."""
    shapes = dict(info.root_params)
    for layer in range(info.num_layers):
        stem = f"{info.layers_prefix}.{layer}"
        for linear in info.linears:
            shapes[f"{stem}.{linear.name}.weight"] = (linear.out_features, linear.in_features)
        shapes |= {f"{stem}.{name}": shape for name, shape in info.layer_params}
    return shapes


def write(model_name: str, directory: Path, seed: int = 0) -> int:
    """Write config.json and bfloat16 safetensors shards with their index.

    Args:
        model_name: as for `--model_name`.
        directory: new; made by this function.
        seed: of the weights.

    Returns:
        Bytes of weights written.

    Raises:
        UserError: the directory exists.
    """
    if directory.exists():
        raise UserError(f"--out {directory}", "exists already", "give a new directory")
    info = arch.read(model_name, need_weights=False)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(info.config, indent=1))
    weights, device = RandomWeights(info, seed), "cuda" if torch.cuda.is_available() else "cpu"
    shapes = all_shapes(info)
    weights.check_names(shapes)
    places: dict[str, str] = {}
    total_bytes = 0
    for number, names in enumerate(_shards(shapes)):
        tensors = zip(names, weights.read_ahead(names, torch.device(device)), strict=True)
        shard = {name: tensor.cpu() for name, tensor in tensors}
        file_name = f"model-{number:05d}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file_name)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total_bytes


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names, nbytes = [], 0
    for name, shape in shapes.items():
        names.append(name)
        nbytes += 2 * math.prod(shape)
        if nbytes >= SHARD_BYTES:
            yield names
            names, nbytes = [], 0
    if names:
        yield names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_name", required=True, help="a known shape, or a directory")
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    args = parser.parse_args()
    nbytes = write(args.model_name, args.out)
    print(f"{args.out}: {nbytes / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
