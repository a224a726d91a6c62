"""The commands `quantize` and `expand`: a model made into another base, tensor by tensor.

`quantize` writes a 4-bit model in the bytes that transformers would save itself. `expand` writes
new layers that change nothing until they are trained, and new tokens. Block expansion: behind each
group of layers stands a copy of its last one whose projections into the residual stream are zero,
so that it hands on what it gets. Training moves the copies alone.

Options are checked before torch is there; the host holds no more than a few tensors at once.

Source: LLaMA Pro, arXiv 2401.02415, section 3.2.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora import arch, atomic, cli
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.trained import NEW_LAYERS, new_layers
from fsdp_qlora.cli import flag
from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.export.model_files import (
    DEVICES,
    DTYPES,
    GIB,
    ITEM_BYTES,
    SHARD_HELP,
    choose_device,
    copy_beside,
    describe_written,
    linear_names,
    write_tokens,
    write_weights,
)

if TYPE_CHECKING:
    import torch

# What stands beside a quantized weight; the last has the code and block size in its name.
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__")
QUANTIZED_BYTES = 0.5 + 4 / 64  # of a weight in 4 bit with its constants, at most
# What writes into the residual stream, by its name in Llama, GPT-NeoX, GPT-2, Mixtral and kin.
INTO_RESIDUAL = {"o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "w2"}
MULTIPLE = 8  # of embedding rows: tensor cores want it
QUANTIZE_USAGE = """usage: python -m fsdp_qlora quantize --model_name NAME --out DIR [--option ...]

Writes a 4-bit model that transformers loads with bitsandbytes, in the bytes it would save itself.
Tensor by tensor: the host holds no more than a few of them."""
EXPAND_USAGE = """usage: python -m fsdp_qlora expand --model_name NAME [--option value ...]

Writes the model with new layers between its own, which change nothing until they are trained: by
train.py --train_type bnb_llama_pro (or hqq_llama_pro) --llama_pro_path DIR. With --add_tokens, its
tokenizer and embeddings get new tokens, to be trained with --modules_to_save embed_tokens,lm_head.
Tensor by tensor."""


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """Options of `quantize`."""

    model_name: str | None = flag(None, "quantize", "directory or hub name of a 16-bit model")
    out: str | None = flag(None, "quantize", "directory to be made")
    quant_type: str = flag("nf4", "quantize", "4-bit code", ("nf4", "fp4"))
    double_quant: bool = flag(True, "quantize", "quantize the block scales too")
    dtype: str | None = flag(None, "quantize", "of all that stays [as stored]", tuple(DTYPES))
    max_shard_gib: float = flag(5.0, "quantize", SHARD_HELP, rule="> 0")
    device: str = flag("auto", "quantize", "where it is computed", DEVICES)


def quantize(argv: list[str]) -> int:
    """Write a 4-bit model.

    Args:
        argv: see QUANTIZE_USAGE.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, no such model (codes 2, 3, 5), a full disk (code 3).
    """
    options = cli.parse(argv, QuantizeOptions, QUANTIZE_USAGE, ("model_name", "out"))
    info = arch.read(str(options.model_name), need_weights=True)
    if info.stored_format:
        rule = f"is quantized already, as {info.stored_format}"
        raise UserError(str(options.model_name), rule, "take the 16-bit original of this model")
    num_linear = arch.num_linear_params(info)
    num_others = sum(math.prod(ref.shape) for ref in info.tensors.values()) - num_linear
    item_bytes = ITEM_BYTES.get(str(options.dtype), 4)
    need_bytes = round(num_linear * QUANTIZED_BYTES) + num_others * item_bytes
    atomic.check(Path(str(options.out)), need_bytes)
    _quantize(options, info, need_bytes)
    return DONE


def _quantize(options: QuantizeOptions, info: ModelInfo, need_bytes: int) -> None:
    """Quantize a model and print what was done."""
    import torch
    from transformers import BitsAndBytesConfig

    from fsdp_qlora.model import weights

    device = choose_device(options.device)
    names = [*info.tensors, *(f"{n}.{part}xxx" for n in info.tensors for part in PARTS)]
    stored = {info.tensors[name].dtype for name in linear_names(info)}  # there is one
    dtype = getattr(torch, DTYPES[options.dtype]) if options.dtype else weights.DTYPES[stored.pop()]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=dtype,
    ).to_dict()
    out, max_bytes = Path(str(options.out)), round(options.max_shard_gib * GIB)
    with atomic.new_directory(out, need_bytes) as draft:
        written = write_weights(draft, names, quantized(options, info, device), max_bytes)
        copy_beside(draft, info, options.dtype, quantization_config=settings)
    stored_gib = sum(ref.nbytes for ref in info.tensors.values()) / GIB
    kind = options.quant_type + (" with double quantization" if options.double_quant else "")
    print(f"{describe_written(out, written)}; {kind}, from {stored_gib:.2f} GiB")
    print(f"load it   AutoModelForCausalLM.from_pretrained({str(out)!r})")


def quantized(
    options: QuantizeOptions, info: ModelInfo, device: "torch.device"
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yield the tensors of the 4-bit model; a few are held at once.

    Args:
        options: quant_type, double_quant, dtype.
        info: the 16-bit model.
        device: where it is computed.

    Yields:
        Name and tensor: of a quantized weight its codes, uint8 [weights / 2, 1], then its
        constants as bitsandbytes names them.
    """
    import torch

    from fsdp_qlora.arch.files import GROUP
    from fsdp_qlora.model.quantize import import_bitsandbytes
    from fsdp_qlora.model.weights import Weights

    linears, names = linear_names(info), list(info.tensors)
    bnb = import_bitsandbytes()
    for name, stored in zip(names, Weights(info).read_ahead(names, device), strict=True):
        dtype = stored.dtype if options.dtype is None else getattr(torch, DTYPES[options.dtype])
        weight = stored.to(dtype)
        if name not in linears:
            yield name, weight
            continue
        codes, state = bnb.quantize_4bit(
            weight,
            blocksize=GROUP,
            quant_type=options.quant_type,
            compress_statistics=options.double_quant,
            quant_storage=torch.uint8,
        )
        yield name, codes
        for part, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{part}", tensor


@dataclasses.dataclass(frozen=True)
class ExpandOptions:
    """Options of `expand`."""

    model_name: str | None = flag(None, "expand", "directory or hub name of a 16-bit model")
    expansion_rate: float | None = flag(
        None, "expand", "new layers for each layer [0.1; 0 with add_tokens]", rule=">= 0"
    )
    add_tokens: str | None = flag(None, "expand", "new tokens: a,b or a FILE, one a line")
    out: str | None = flag(None, "expand", "directory [MODEL_blk_exp-OLD-NEW, or MODEL_tokens]")
    max_shard_gib: float = flag(5.0, "expand", SHARD_HELP, rule="> 0")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with new tokens.

    Args:
        core: `tokenizers.Tokenizer`.
        num_known: ids that meant something before; what follows has no trained row.
        num_rows: of the embeddings now.
    """

    core: Any
    num_known: int
    num_rows: int

    def extended(self, weight_VH: "torch.Tensor") -> "torch.Tensor":
        """Give an embedding, or a head, rows for new tokens: the mean of the known ones.

        Args:
            weight_VH: as stored.

        Returns:
            [num_rows, H]; the rows of known tokens are as they were.
        """
        import torch

        rows = weight_VH.new_empty(self.num_rows, weight_VH.shape[1])
        known = weight_VH[: self.num_known]
        rows[: len(known)] = known
        rows[len(known) :] = known.mean(0, dtype=torch.float32)
        return rows


def expand(argv: list[str]) -> int:
    """Write a block-expanded model.

    Args:
        argv: see EXPAND_USAGE.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, no such model (codes 2, 3, 5), what writes into the residual
            stream is not known by name (code 2), a full disk (code 3).
    """
    options = cli.parse(argv, ExpandOptions, EXPAND_USAGE, ("model_name",))
    info = arch.read(str(options.model_name), need_weights=True)
    rate = options.expansion_rate
    if rate is None:
        rate = 0.0 if options.add_tokens else 0.1
    num_new = int(info.num_layers * rate)
    if not 0 < num_new <= info.num_layers and (rate or not options.add_tokens):
        got, rule = f"--expansion_rate {rate:g}", "makes no new layer of"
        rule = rule if num_new < 1 else "makes more than one new layer for each of"
        remedy = f"take from {1 / info.num_layers:.3g} to 1"
        raise UserError(got, f"{rule} {info.num_layers} layers", remedy)
    assert info.path is not None
    usual = f"{info.path.name}_blk_exp-{info.num_layers}-{info.num_layers + num_new}"
    out = Path(options.out or (usual if num_new else f"{info.path.name}_tokens"))
    nbytes = sum(ref.nbytes for ref in info.tensors.values())
    need_bytes = round(nbytes * (1 + num_new / info.num_layers))
    atomic.check(out, need_bytes)
    _expand(options, info, num_new, out, need_bytes)
    return DONE


def _expand(
    options: ExpandOptions, info: ModelInfo, num_new: int, out: Path, need_bytes: int
) -> None:
    """Expand a model, tensor by tensor, and print what was done."""
    added = new_layers(info.num_layers, num_new) if num_new else ()
    vocabulary = add_tokens(info, options.add_tokens) if options.add_tokens else None
    zeroed = {name for name, *_ in _sources(info, added) if INTO_RESIDUAL & set(name.split("."))}
    if added and len(zeroed) < 2 * info.num_layers:
        rule = f"none of {', '.join(sorted(INTO_RESIDUAL))} is in each half of its layers"
        raise UserError(f"{info.path}: {info.model_type}", rule, "expand a Llama-like model")
    with atomic.new_directory(out, need_bytes) as draft:
        names = [name for _, name, _ in _sources(info, added)]
        tensors, max_bytes = _tensors(info, added, vocabulary), round(options.max_shard_gib * GIB)
        write_weights(draft, names, tensors, max_bytes)
        changes = _changes(info, added)
        if vocabulary is not None:
            changes["vocab_size"] = vocabulary.num_rows
        copy_beside(draft, info, None, **changes)
        if vocabulary is not None:
            write_tokens(draft, vocabulary.core)
    flags = f"--train_type qlora --model_name {out} --modules_to_save embed_tokens,lm_head"
    if added:
        flags = f"--train_type bnb_llama_pro --llama_pro_path {out}"
        print(f"layers    {info.num_layers} and {num_new} new ones, numbers {added}")
    if vocabulary is not None:
        num_tokens = vocabulary.core.get_vocab_size()
        print(f"tokens    {num_tokens:,}, embeddings of {vocabulary.num_rows:,} rows")
    print(f"written   {out}\nnext      python train.py {flags} --dataset YOUR_ROWS.jsonl")


def _order(num_layers: int, added: tuple[int, ...]) -> list[int]:
    """Which old layer each layer of the result comes from."""
    order = list(range(num_layers))
    for number in added:
        order.insert(number, order[number - 1])
    return order


def _sources(info: ModelInfo, added: tuple[int, ...]) -> Iterator[tuple[str, str, bool]]:
    """(name in the old model, name in the new one, whether it is a copy), old one by old one."""
    places: dict[int, list[int]] = {}
    for number, layer in enumerate(_order(info.num_layers, added)):
        places.setdefault(layer, []).append(number)
    stem = f"{info.layers_prefix}."
    for name in info.tensors:
        old, _, rest = name.removeprefix(stem).partition(".")
        if not name.startswith(stem):
            yield name, name, False
            continue
        for number in places[int(old)]:
            yield name, f"{stem}{number}.{rest}", number in added


def _tensors(
    info: ModelInfo, added: tuple[int, ...], vocabulary: Vocabulary | None
) -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch

    from fsdp_qlora.model.weights import Weights

    ends = {name for name, shape in info.root_params if shape[0] == info.vocab_size}
    read = Weights(info).read_ahead(list(info.tensors), torch.device("cpu"))
    last, tensor = "", torch.empty(0)
    for old, new, is_copy in _sources(info, added):
        if old != last:
            last, tensor = old, next(read)
            if vocabulary is not None and old in ends:
                tensor = vocabulary.extended(tensor)
        is_zero = is_copy and INTO_RESIDUAL & set(old.split("."))
        yield new, torch.zeros_like(tensor) if is_zero else tensor


def _changes(info: ModelInfo, added: tuple[int, ...]) -> dict[str, Any]:
    """What config.json must say of new layers; lists of one entry a layer grow with them."""
    from transformers import AutoConfig

    if not added:
        return {}
    order = _order(info.num_layers, added)
    lists = {
        key: [values[old] for old in order]
        for key, values in AutoConfig.for_model(**info.config).to_dict().items()
        if isinstance(values, list) and len(values) == info.num_layers
    }
    return lists | {"num_hidden_layers": len(order), NEW_LAYERS: list(added)}


def add_tokens(info: ModelInfo, text: str) -> Vocabulary:
    """Add tokens to the tokenizer of a model, in memory.

    Args:
        info: the model, with its files.
        text: a file with one token a line, or tokens between commas.

    Raises:
        UserError: there are none, or a token is known already (code 2).
    """
    from fsdp_qlora.data import tokenizer

    path = Path(text).expanduser()
    is_file = len(text) < 256 and path.is_file()
    parts = path.read_text(encoding="utf-8").splitlines() if is_file else text.split(",")
    tokens = [part.strip() for part in parts if part.strip()]
    core = tokenizer.read(tokenizer.directory(info)).core
    known = [token for token in tokens if core.token_to_id(token) is not None]
    if known or not tokens:
        rule = f"{known[0]!r} is in the tokenizer already" if known else "names no token"
        raise UserError(f"--add_tokens {text}", rule, "give new tokens, as a,b or one a line")
    num_known = min(core.get_vocab_size(), info.vocab_size)
    core.add_special_tokens(tokens)
    num_rows = max(core.get_vocab_size(), info.vocab_size)
    return Vocabulary(core, num_known, math.ceil(num_rows / MULTIPLE) * MULTIPLE)
