"""The verbs that make files of a model: merge, quantize, expand. Checked before torch is there."""

import contextlib
import dataclasses
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from fsdp_qlora import arch, atomic
from fsdp_qlora.cli import flag, parse
from fsdp_qlora.config import TEXT
from fsdp_qlora.errors import DONE, SIGTERM, UserError
from fsdp_qlora.results import adapter_files

OptionsT = TypeVar("OptionsT")
FORMATS = ("nf4", "nf4_dq", "fp4", "fp4_dq", "int8", "hqq2", "hqq3", "hqq4", "hqq8", "bf16")
DTYPES = ("bf16", "fp16", "fp32")
DEVICES = ("auto", "cpu", "cuda")
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
QUANTISED_BYTES = 0.5 + 4 / 64  # of a weight in 4 bit with its constants, at most
SHARD_HELP = "largest output file in GiB"
BASE_HELP = "what the adapter is added to; auto: what training saw, if the adapter tells"
EVIDENCE_HELP = "rows on which base + adapter and the result are compared; 0: none"
MERGE_USAGE = """usage: python -m fsdp_qlora merge --adapter DIR --out DIR [--option value ...]

Adds a LoRA adapter to its base, tensor by tensor, and writes a plain model that transformers and
llama.cpp's converter read. `--base dequantized` adds it to the 4-bit base as training saw it,
`16bit` to the original weights. How far the result is from base + adapter as trained is measured,
printed and kept in merge.json."""
QUANTIZE_USAGE = """usage: python -m fsdp_qlora quantize --model_name NAME --out DIR [--option ...]

Writes a 4-bit model that transformers loads with bitsandbytes, in the bytes it would save itself.
Tensor by tensor: the host holds no more than a few of them."""
EXPAND_USAGE = """usage: python -m fsdp_qlora expand --model_name NAME [--option value ...]

Writes the model with new layers between its own, which change nothing until they are trained: by
train.py --train_type bnb_llama_pro (or hqq_llama_pro) --llama_pro_path DIR. With --add_tokens, its
tokenizer and embeddings get new tokens, to be trained with --modules_to_save embed_tokens,lm_head.
Tensor by tensor."""


@dataclasses.dataclass(frozen=True)
class MergeOptions:
    """Options of `merge`."""

    adapter: str | None = flag(None, "merge", "directory of the adapter")
    out: str | None = flag(None, "merge", "directory to be made")
    model_name: str | None = flag(None, "merge", "its base [as adapter_config.json has it]")
    base: str = flag("auto", "merge", BASE_HELP, ("auto", "16bit", "dequantized"))
    format: str | None = flag(None, "merge", "of that base, where nothing tells", FORMATS)
    quant_cache: str = flag("auto", "merge", "where training kept its 4-bit bytes", rule=TEXT)
    any_base: bool = flag(False, "merge", "take another base than the one it was trained on")
    dtype: str = flag("bf16", "merge", "of the weights that are written", DTYPES)
    max_shard_gib: float = flag(5.0, "merge", SHARD_HELP, rule="> 0")
    device: str = flag("auto", "merge", "where it is computed", DEVICES)

    evidence_rows: int = flag(8, "evidence", EVIDENCE_HELP, rule=">= 0")
    evidence_tokens: int = flag(64, "evidence", "longest such row in tokens", rule=">= 2")
    dataset: str | None = flag(None, "evidence", "where they come from [that of the run]")


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """Options of `quantize`."""

    model_name: str | None = flag(None, "quantize", "directory or hub name of a 16-bit model")
    out: str | None = flag(None, "quantize", "directory to be made")
    quant_type: str = flag("nf4", "quantize", "4-bit code", ("nf4", "fp4"))
    double_quant: bool = flag(True, "quantize", "quantise the block scales too")
    dtype: str | None = flag(None, "quantize", "of all that stays [as stored]", DTYPES)
    max_shard_gib: float = flag(5.0, "quantize", SHARD_HELP, rule="> 0")
    device: str = flag("auto", "quantize", "where it is computed", DEVICES)


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


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM unwind the program, so that drafts are removed; the exit code tells of it."""

    def stop(*_: Any) -> None:
        sys.exit(SIGTERM)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def merge(argv: list[str]) -> int:
    """Merge an adapter into its base.

    Args:
        argv: see MERGE_USAGE.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, an adapter or a base that does not fit (codes 2, 5), a full
            disk (code 3).
    """
    options = parse(argv, MergeOptions, MERGE_USAGE, ("adapter", "out"))
    adapter = adapter_files.read(Path(str(options.adapter)).expanduser())
    if not (options.model_name or adapter.base_name):
        got = f"{adapter.path}: base_model_name_or_path"
        raise UserError(got, "is empty", "name the base with --model_name")
    info = arch.read(options.model_name or adapter.base_name, need_weights=True)
    adapter_files.check(adapter, info)
    num_weights = sum(math.prod(ref.shape) for ref in info.tensors.values())
    need_bytes = num_weights * ITEM_BYTES[options.dtype]
    atomic.check(Path(str(options.out)), need_bytes)
    from fsdp_qlora.results import merge as merging

    with stoppable():
        merging.run(options, adapter, info, need_bytes)
    return DONE


def quantize(argv: list[str]) -> int:
    """Write a 4-bit model.

    Args:
        argv: see QUANTIZE_USAGE.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, no such model (codes 2, 3, 5), a full disk (code 3).
    """
    options = parse(argv, QuantizeOptions, QUANTIZE_USAGE, ("model_name", "out"))
    info = arch.read(str(options.model_name), need_weights=True)
    if info.stored_format:
        rule = f"is quantized already, as {info.stored_format}"
        raise UserError(str(options.model_name), rule, "take the 16-bit original of this model")
    num_linear = arch.num_linear_params(info)
    num_others = sum(math.prod(ref.shape) for ref in info.tensors.values()) - num_linear
    item_bytes = ITEM_BYTES.get(str(options.dtype), 4)
    need_bytes = round(num_linear * QUANTISED_BYTES) + num_others * item_bytes
    atomic.check(Path(str(options.out)), need_bytes)
    from fsdp_qlora.results import quantized

    with stoppable():
        quantized.run(options, info, need_bytes)
    return DONE


def expand(argv: list[str]) -> int:
    """Write a block-expanded model.

    Args:
        argv: see EXPAND_USAGE.

    Returns:
        Exit code.

    Raises:
        UserError: a wrong option, no such model (codes 2, 3, 5), a full disk (code 3).
    """
    options = parse(argv, ExpandOptions, EXPAND_USAGE, ("model_name",))
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
    usual = usual if num_new else f"{info.path.name}_tokens"
    out = Path(options.out or usual)
    nbytes = sum(ref.nbytes for ref in info.tensors.values())
    need_bytes = round(nbytes * (1 + num_new / info.num_layers))
    atomic.check(out, need_bytes)
    from fsdp_qlora.results import expand as expanding

    with stoppable():
        expanding.run(options, info, num_new, out, need_bytes)
    return DONE
