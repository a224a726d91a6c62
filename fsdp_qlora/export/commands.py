"""The command `export`: a new model, written tensor by tensor, in one of several forms.

`merged` adds an adapter to its base and compares the sum with both. `4bit` writes a 4-bit model in
the bytes that transformers would save itself. `expanded` writes new layers that change nothing
until they are trained, and new tokens. Options are checked before torch is there; the host holds no
more than a few tensors at once.
"""

import dataclasses
import math
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsdp_qlora import arch, atomic, cli, hardware
from fsdp_qlora.arch.files import KEPT, Stored, read_json
from fsdp_qlora.cli import OptionsT, flag
from fsdp_qlora.config import TEXT
from fsdp_qlora.data import tokenizer
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError
from fsdp_qlora.export import adapter as adapters
from fsdp_qlora.export import serving
from fsdp_qlora.export.adapter import SavedAdapter
from fsdp_qlora.planning.sizes import FORMATS, new_layers

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # torch's names
DEVICES, BASES = ("auto", "cpu", "cuda"), ("auto", "16bit", "dequantized")
# What stands beside a quantized weight; the last has the code and block size in its name.
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__")
QUANTIZED_BYTES = 0.5 + 4 / 64  # of a weight in 4 bit with its constants, at most


@dataclasses.dataclass(frozen=True)
class OutputOptions:
    """Options of every command that writes a model."""

    out: str | None = flag(None, "output", "directory to be made")
    max_shard_gib: float = flag(5.0, "output", "largest output file in GiB", rule="> 0")


@dataclasses.dataclass(frozen=True)
class CheckOptions(OutputOptions):
    """Options of every command that compares what it writes with what it read."""

    evidence_rows: int = flag(8, "check", "rows to compare on; 0: none", rule=">= 0")
    evidence_tokens: int = flag(64, "check", "longest such row in tokens", rule=">= 2")
    dataset: str | None = flag(None, "check", "where they come from [of the run, else docs]")


@dataclasses.dataclass(frozen=True)
class MergeOptions(CheckOptions):
    """Add a LoRA adapter to its base, tensor by tensor, and write a plain model.

    transformers and llama.cpp's converter read it. `--base dequantized` adds the adapter to the
    4-bit base as training saw it, `16bit` to the original weights. The merge check measures how far
    the result is from base + adapter as trained; it is printed and kept in merge.json.
    """

    dtype: str = flag("bf16", "output", "of the weights that are written", tuple(DTYPES))
    adapter: str | None = flag(None, "merge", "directory of the adapter")
    model_name: str | None = flag(None, "merge", "its base [as adapter_config.json has it]")
    base: str = flag("auto", "merge", "added to what; auto: to what training saw", BASES)
    format: str | None = flag(None, "merge", "of that base, where nothing tells", FORMATS)
    quant_cache: str = flag("auto", "merge", "where training kept its 4-bit bytes", rule=TEXT)
    any_base: bool = flag(False, "merge", "take another base than the one it was trained on")
    mxfp4: str = flag("kept", "merge", "experts in it that no adapter changes", ("kept", "16bit"))
    device: str = flag("auto", "merge", "where it is computed", DEVICES)


@dataclasses.dataclass(frozen=True)
class GgufOptions(MergeOptions):
    """Write a model for llama.cpp and Ollama: a GGUF file, and a Modelfile with its chat template.

    --adapter is merged first, as `export merged` does; a whole model is --model_name alone.
    llama.cpp's own scripts convert it, and llama-quantize what they cannot.
    """

    outtype: str = flag("q4_k_m", "gguf", "of the weights", serving.OUTTYPES)
    llama_cpp: str | None = flag(None, "gguf", "llama.cpp's directory [its programs are on PATH]")


@dataclasses.dataclass(frozen=True)
class LoraGgufOptions:
    """Write an adapter alone as GGUF, for `llama-cli -m BASE.gguf --lora FILE`."""

    out: str | None = flag(None, "output", "directory to be made")
    outtype: str = flag("f16", "output", "of the matrices", serving.CONVERTED)
    adapter: str | None = flag(None, "lora-gguf", "directory of the adapter")
    model_name: str | None = flag(None, "lora-gguf", "its base [as adapter_config.json has it]")
    any_base: bool = flag(False, "lora-gguf", "take another base than the one it was trained on")
    llama_cpp: str | None = flag(None, "lora-gguf", "llama.cpp's directory [it is on PATH]")


@dataclasses.dataclass(frozen=True)
class QuantizeOptions(CheckOptions):
    """Write a 4-bit model that transformers loads with bitsandbytes, as it would save it itself.

    Tensor by tensor: the host holds no more than a few of them. The check says what was lost: how
    far its logits are from the original's, and both losses on rows of --dataset.
    """

    model_name: str | None = flag(None, "quantize", "directory or hub name of a 16-bit model")
    quant_type: str = flag("nf4", "quantize", "4-bit code", ("nf4", "fp4"))
    double_quant: bool = flag(True, "quantize", "quantize the block scales too")
    dtype: str | None = flag(None, "quantize", "of all that stays [as stored]", tuple(DTYPES))
    device: str = flag("auto", "quantize", "where it is computed", DEVICES)


@dataclasses.dataclass(frozen=True)
class ExpandOptions(OutputOptions):
    """Write the model with new layers between its own, which change nothing until they are trained.

    That is done by train.py --train_type bnb_llama_pro (or hqq_llama_pro) --llama_pro_path DIR.
    With --add_tokens, tokenizer and embeddings get new tokens, to be trained with --modules_to_save
    embed_tokens,lm_head. Tensor by tensor.
    """

    out: str | None = flag(None, "output", "directory [MODEL_blk_exp-OLD-NEW, or MODEL_tokens]")
    model_name: str | None = flag(None, "expand", "directory or hub name of a 16-bit model")
    expansion_rate: float | None = flag(None, "expand", "new layers a layer [0.1]", rule=">= 0")
    add_tokens: str | None = flag(None, "expand", "new tokens: a,b or a FILE, one a line")


def _parse(name: str, argv: list[str], cls: type[OptionsT], *needed: str) -> OptionsT:
    values = " ".join(f"--{option} {option.upper()}" for option in needed)
    usage = f"usage: python -m fsdp_qlora export {name} {values} [--option value ...]"
    return cli.parse(argv, cls, usage, needed)


@contextmanager
def _new_model(
    out: Path, need_bytes: float, names: Iterable[str], tensors: Any, options: OutputOptions
) -> Iterator[tuple[Path, dict[str, float]]]:
    """Write the tensors; give the directory, to be completed, and what `write_weights` says."""
    from fsdp_qlora.export import model_files

    with atomic.new_directory(out, round(need_bytes)) as draft:
        max_bytes = round(options.max_shard_gib * hardware.GIB)
        written = model_files.write_weights(draft, names, tensors, max_bytes)
        yield draft, written
    text = "{num_files} files, {gib:.2f} GiB in {written_s:.1f} s; at most {host_peak_gib:.2f} GiB"
    print(f"written   {out}: {text.format_map(written)} of host memory")


def _choose_device(name: str) -> Any:
    """The CPU, or the GPU if there is one and `name` is not cpu."""
    import torch

    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda", "there is no GPU here", "use --device cpu", ENVIRONMENT)
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def merge(argv: list[str]) -> int:
    """Merge an adapter into its base.

    Args:
        argv: see MergeOptions.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, an adapter or a base that does not fit (codes 2, 5), a full
            disk (code 3), values that the dtype cannot hold (code 5).
    """
    options = _parse("merged", argv, MergeOptions, "adapter", "out")
    _merge(options, *_read_both(options))
    return DONE


def _read_both(options: MergeOptions | LoraGgufOptions) -> tuple[SavedAdapter, arch.ModelInfo]:
    """Read an adapter and its base, and see that they belong together."""
    adapter = adapters.read(Path(os.path.expanduser(str(options.adapter))))
    if not (options.model_name or adapter.base_name):
        got = f"{adapter.path}: base_model_name_or_path"
        raise UserError(got, "is empty", "name the base with --model_name")
    info = arch.read(options.model_name or adapter.base_name, need_weights=True)
    adapters.check(adapter, info)
    adapters.check_base(adapter, info, options.any_base)
    return adapter, info


def _merge(options: MergeOptions, adapter: SavedAdapter, info: arch.ModelInfo) -> None:
    """Merge, compare, and print what was done."""
    format_name = options.format or adapter.record.get("format")
    if format_name not in (None, *FORMATS):
        remedy = f"name one with --format: {' '.join(FORMATS)}"
        raise UserError(f"{adapter.path}: format {format_name!r}", "is unknown", remedy)
    if options.base == "dequantized" and format_name is None:
        rule = "the adapter does not tell what its base was quantized to"
        raise UserError("--base dequantized", rule, f"add --format: {' '.join(FORMATS)}")
    with cli.Progress("imports libraries"):
        import torch

        from fsdp_qlora.export import model_files, new_weights

    device, dtype = _choose_device(options.device), getattr(torch, DTYPES[options.dtype])
    compute = getattr(torch, str(adapter.record.get("compute_dtype") or "bfloat16"))
    seen = new_weights.TrainedBase(info, adapter, compute, device, format_name, options.quant_cache)
    is_dequantized = options.base == "dequantized"
    is_dequantized |= options.base == "auto" and format_name not in (None, "bf16")
    note = f"{format_name} dequantized, as training saw it, {seen.note}"
    parts = new_weights.with_blocks(info, adapter) if options.mxfp4 == "kept" else info
    out, names = Path(str(options.out)), new_weights.file_names(parts)
    need_bytes = dtype.itemsize * sum(math.prod(ref.shape) for ref in parts.tensors.values())
    need_bytes += sum(ref.nbytes for ref in parts.towers.values())
    atomic.check(out, need_bytes)
    print(f"adapter   {adapter.path}: {adapter}")
    print(f"base      {info.path}: {note if is_dequantized else 'its 16-bit weights'}", flush=True)
    if said := adapters.base_note(adapter, str(format_name) if is_dequantized else "bf16"):
        print(said)
    base = seen if is_dequantized else dataclasses.replace(seen, format_name=None)
    merged = new_weights.merged(base, dtype, list(parts.tensors))
    tensors, stored, how = new_weights.joined(parts, merged), Stored(), {}
    if info.path is not None and parts is not info:
        config = read_json(info.path / "config.json")
        stored, how = info.stored, {"quantization_config": config["quantization_config"]}
    elif info.stored.method and not info.stored.whole:
        print(f"form      the base is stored in {info.stored.method}, the result in 16 bit")
    with _new_model(out, need_bytes, names, tensors, options) as (draft, written):
        model_files.copy_beside(draft, info, DTYPES[options.dtype], adapter.path, **how)
        there = arch.info.stored_tensors(draft, dict(info.config), info.wrapper, stored)
        result = dataclasses.replace(info, tensors=there[0], quantized=there[2], stored=stored)
        no_more = SavedAdapter(adapter.path, "", {})
        result_base = new_weights.TrainedBase(result, no_more, compute, device)
        evidence = new_weights.check(seen, result_base, options)
        facts: dict[str, Any] = {"adapter": str(adapter.path), "base": str(info.path)}
        facts |= {"base_digest": info.digest(1), "trained_over": format_name}
        facts |= {"added_to": "dequantized" if is_dequantized else "16bit", "dtype": options.dtype}
        facts |= {"packed_bytes": seen.note, "num_replaced": len(adapter.replaced)}
        facts |= {"num_merged": len(adapter.pairs) + len(adapter.experts), "device": device.type}
        facts |= {"versions": hardware.versions(device), **written, "evidence": evidence}
        atomic.write_json(draft / "merge.json", facts)
    print(new_weights.lines(evidence))


def quantize(argv: list[str]) -> int:
    """Write a 4-bit model.

    Args:
        argv: see QuantizeOptions.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, no such model (codes 2, 3, 5), a full disk (code 3).
    """
    options = _parse("4bit", argv, QuantizeOptions, "model_name", "out")
    info = arch.read(str(options.model_name), need_weights=True)
    if info.stored.method in KEPT:
        rule = f"is quantized already, as {info.stored.method}"
        raise UserError(str(options.model_name), rule, "take the 16-bit original of this model")
    if any(ref.joint for ref in info.tensors.values()):
        rule = "holds the experts of a layer in one tensor, which transformers keeps in 16 bit"
        raise UserError(str(options.model_name), rule, "train on it as it is")
    with cli.Progress("imports libraries"):
        from transformers import BitsAndBytesConfig

        from fsdp_qlora.export import model_files, new_weights
        from fsdp_qlora.model.weights import DTYPES as STORED

    num_linear = sum(n.num_weights for kind in info.by_layer for n in kind.linears)
    out = Path(str(options.out))
    num_others = sum(math.prod(ref.shape) for ref in info.tensors.values()) - num_linear
    item_bytes = 2 if options.dtype in ("bf16", "fp16") else 4
    need_bytes = num_linear * QUANTIZED_BYTES + num_others * item_bytes
    names = [*info.tensors, *(f"{n}.{part}xxx" for n in info.tensors for part in PARTS)]
    device, dtype = _choose_device(options.device), DTYPES.get(str(options.dtype))
    stored = info.tensors[next(iter(info.linear_places()))].dtype
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=dtype or STORED[stored],
    )
    tensors = new_weights.quantized(info, settings, dtype, device)
    with _new_model(out, need_bytes, names, tensors, options) as (draft, _):
        model_files.copy_beside(draft, info, dtype, quantization_config=settings.to_dict())
        result, compute = arch.read(str(draft), need_weights=True), settings.bnb_4bit_compute_dtype
        nothing, stored_as = SavedAdapter(out, "", {}), result.stored.whole
        seen = new_weights.TrainedBase(info, nothing, compute, device)
        packed = new_weights.TrainedBase(result, nothing, compute, device, stored_as)
        lost = new_weights.check(seen, packed, options)
    print(new_weights.lines(lost, "in 4 bit against the original"))
    print(f"load it   AutoModelForCausalLM.from_pretrained({str(out)!r})")
    return DONE


def expand(argv: list[str]) -> int:
    """Write a block-expanded model, or one with more tokens.

    Args:
        argv: see ExpandOptions.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, no such model (codes 2, 3, 5), what writes into the residual
            stream is not known by name (code 2), a full disk (code 3).
    """
    options = _parse("expanded", argv, ExpandOptions, "model_name")
    info = arch.read(str(options.model_name), need_weights=True)
    rate = 0.0 if options.add_tokens else 0.1
    rate = rate if options.expansion_rate is None else options.expansion_rate
    num_new = int(info.num_layers * rate)
    if not 0 < num_new <= info.num_layers and (rate or not options.add_tokens):
        rule = f"makes {num_new} new layers, and there are {info.num_layers} to stand behind"
        remedy = f"take from {1 / info.num_layers:.3g} to 1"
        raise UserError(f"--expansion_rate {rate:g}", rule, remedy)
    with cli.Progress("imports libraries"):
        from fsdp_qlora.export import model_files, new_weights

    assert info.path is not None
    added = new_layers(info.num_layers, num_new) if num_new else ()
    usual = f"{info.path.name}_blk_exp-{info.num_layers}-{info.num_layers + num_new}"
    out = Path(options.out or (usual if num_new else f"{info.path.name}_tokens"))
    expansion = new_weights.Expansion(info, added)
    tokens = new_weights.add_tokens(info, options.add_tokens) if options.add_tokens else None
    names, tensors = [new for _, new, _ in expansion.sources], expansion.tensors(tokens)
    need_bytes = sum(ref.nbytes for ref in info.tensors.values()) * (1 + num_new / info.num_layers)
    with _new_model(out, need_bytes, names, tensors, options) as (draft, _):
        changes = expansion.changes() | ({} if tokens is None else {"vocab_size": tokens.num_rows})
        model_files.copy_beside(draft, info, None, **changes)
        if tokens is not None:
            model_files.write_tokens(draft, tokens.core)
    name = shlex.quote(str(out))
    flags = f"--train_type qlora --model_name {name} --modules_to_save embed_tokens,lm_head"
    if added:
        flags = f"--train_type bnb_llama_pro --llama_pro_path {name}"
        print(f"layers    {info.num_layers} and {num_new} new ones, numbers {added}")
    if tokens is not None:
        print(f"tokens    {tokens.core.get_vocab_size():,}, embeddings of {tokens.num_rows:,} rows")
    print(f"next      python train.py {flags} --dataset YOUR_ROWS.jsonl")
    return DONE


def gguf(argv: list[str]) -> int:
    """Write a model as GGUF.

    Args:
        argv: see GgufOptions.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, no such model (codes 2, 3, 5), llama.cpp is not there or refuses
            the model (code 3), a full disk (code 3).
    """
    options = _parse("gguf", argv, GgufOptions, "out")
    serving.find_tool(serving.CONVERTER, options.llama_cpp)
    if options.outtype not in serving.CONVERTED:
        serving.find_tool(serving.QUANTIZER, options.llama_cpp)
    own = list[SavedAdapter]()
    if options.adapter:
        *own, info = _read_both(options)
    elif options.model_name:
        info = arch.read(options.model_name, need_weights=True)
    else:
        raise UserError("export gguf", "names no model", "give --adapter or --model_name")
    if info.stored.method in KEPT and not own:
        rule = f"is quantized, as {info.stored.method}"
        raise UserError(str(info.path), rule, "take the 16-bit original of this model")
    assert info.path is not None
    has_own = own and tokenizer.has_files(own[0].path)
    serving.check_tokens(own[0].path if has_own else info.path, info)
    out, model, system = Path(str(options.out)), info.path, None
    need_bytes = 2 * sum(math.prod(ref.shape) for ref in info.tensors.values()) * (1 + len(own))
    with atomic.new_directory(out, need_bytes) as draft:
        for adapter in own:
            model, cfg = draft / "merged", adapters.run_config(adapter.path)
            system = None if cfg is None else cfg.system_prompt
            _merge(dataclasses.replace(options, out=str(model)), adapter, info)
        lines = serving.write_gguf(model, draft, options.outtype, options.llama_cpp)
        file = next(draft.glob("*.gguf"))
        lines.append(serving.write_modelfile(draft, file.name, model, system))
        if own:
            shutil.rmtree(model)
    print(f"written   {out}: {'; '.join(lines)}")
    name, file = shlex.quote(out.name.lower()), out / file.name
    print(f"next      llama-cli -m {shlex.quote(str(file))}")
    print(f"          ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))}")
    return DONE


def lora_gguf(argv: list[str]) -> int:
    """Write an adapter as GGUF.

    Args:
        argv: see LoraGgufOptions.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, an adapter or a base that does not fit (codes 2, 5), llama.cpp is
            not there or refuses it (code 3), a full disk (code 3).
    """
    options = _parse("lora-gguf", argv, LoraGgufOptions, "adapter", "out")
    script = serving.find_tool(serving.LORA_CONVERTER, options.llama_cpp)
    adapter, info = _read_both(options)
    is_more = any(pair.magnitude for pair in adapter.pairs.values()) or adapter.experts
    if is_more or adapter.replaced:
        rule = "is more than LoRA of linears (DoRA, experts, modules_to_save or new layers)"
        raise UserError(str(adapter.path), rule, "write the whole model: export gguf")
    assert info.path is not None
    out = Path(str(options.out))
    with atomic.new_directory(out, (adapter.path / adapters.WEIGHTS_NAME).stat().st_size) as draft:
        serving.write_lora(adapter, info.path, draft, options.outtype, script)
    file = shlex.quote(str(out / f"lora-{options.outtype}.gguf"))
    if said := adapters.base_note(adapter, "bf16"):
        print(said)
    print(f"written   {file}: {adapter}")
    print(f"next      llama-cli -m BASE.gguf --lora {file}")
    return DONE
