"""A 4-bit model as transformers and bitsandbytes save one, written tensor by tensor.

The linears of the decoder layers are quantised, embedding, norms and head stay: what transformers
does when it loads with BitsAndBytesConfig.
"""

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.atomic import new_directory
from fsdp_qlora.model.quantize import GROUP_SIZE, import_bitsandbytes
from fsdp_qlora.model.weights import Weights
from fsdp_qlora.results import base_weights
from fsdp_qlora.results.beside import DTYPES, copy_beside
from fsdp_qlora.results.merge import GIB
from fsdp_qlora.results.shards import Shards, edit_json
from fsdp_qlora.results.verbs import QuantizeOptions

PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__")


def run(options: QuantizeOptions, info: ModelInfo, need_bytes: int) -> None:
    """Quantise a model and say what was done.

    Args:
        options: of the command line.
        info: the 16-bit model, with its tensors.
        need_bytes: of the result, at most.

    Raises:
        UserError: a full disk (code 3), a damaged file (code 5).
    """
    began_s, device = time.perf_counter(), base_weights.choose_device(options.device)
    names = [*info.tensors, *(f"{n}.{part}xxx" for n in info.tensors for part in PARTS)]
    out = Path(str(options.out))
    with new_directory(out, need_bytes) as draft:
        with Shards(draft, names, round(options.max_shard_gib * GIB)) as shards:
            for name, tensor in quantised(options, info, device):
                shards.add(name, tensor)
        copy_beside(draft, info, options.dtype)
        edit_json(draft / "config.json", {"quantization_config": settings(options, info)})
    stored_gib = sum(ref.nbytes for ref in info.tensors.values()) / GIB
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    kind = options.quant_type + (" with double quantisation" if options.double_quant else "")
    print(
        f"written   {out}: {shards.num_files} files, {stored_gib:.2f} -> "
        f"{shards.total_bytes / GIB:.2f} GiB, {kind}, in {time.perf_counter() - began_s:.1f} s; "
        f"at most {peak_gib:.2f} GiB of host memory"
    )
    print(f"load it   AutoModelForCausalLM.from_pretrained({str(out)!r})")


def quantised(
    options: QuantizeOptions, info: ModelInfo, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the 4-bit model; a few are held at once.

    Args:
        options: quant_type, double_quant, dtype.
        info: the 16-bit model.
        device: where it is computed.

    Yields:
        Name and tensor: of a quantised weight its packed bytes, uint8 [weights / 2, 1], then its
        constants as bitsandbytes names them.
    """
    linears, names = base_weights.linear_names(info), list(info.tensors)
    bnb = import_bitsandbytes()
    for name, stored in zip(names, Weights(info).read_ahead(names, device), strict=True):
        weight = stored if options.dtype is None else stored.to(DTYPES[options.dtype])
        if name not in linears:
            yield name, weight
            continue
        packed, state = bnb.quantize_4bit(
            weight,
            blocksize=GROUP_SIZE,
            quant_type=options.quant_type,
            compress_statistics=options.double_quant,
            quant_storage=torch.uint8,
        )
        yield name, packed
        for part, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{part}", tensor


def settings(options: QuantizeOptions, info: ModelInfo) -> dict:
    """What config.json must say, in the words of the transformers that is installed.

    Args:
        options: quant_type, double_quant, dtype.
        info: the 16-bit model; its linears have one dtype.

    Returns:
        The value of quantization_config.
    """
    from transformers import BitsAndBytesConfig

    stored = {info.tensors[name].dtype for name in base_weights.linear_names(info)}
    dtype = DTYPES[options.dtype] if options.dtype else base_weights.DTYPES[stored.pop()]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return config.to_dict()
