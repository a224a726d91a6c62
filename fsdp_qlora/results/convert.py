"""The state dict that AnswerDotAI/fsdp_qlora saves, made into an adapter in peft's format.

After lora and qlora it holds the whole model as peft names it, the base included (packed to one
column when it was 4 bit); after custom_lora, custom_qlora and hqq_lora only each linear's pair, an
nn.Sequential called lora_AB. Names may still carry those of FSDP's wrappers.

Source: AnswerDotAI/fsdp_qlora, train.py (end of fsdp_main) and scripts/lora.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fsdp_qlora import __version__
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.results import adapter_files
from fsdp_qlora.results.adapter_files import WEIGHTS_NAME
from fsdp_qlora.results.new_directory import new_directory
from fsdp_qlora.results.shards import SafetensorsFile
from fsdp_qlora.results.verbs import ConvertOptions
from fsdp_qlora.weights_files import TensorRef, describe, read_header

WRAPPERS = re.compile(
    r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_offload_wrapped_module)\."
)
BY_PEFT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.default\.weight")
BY_OWN_CLASS = re.compile(r"(?P<module>.+)\.lora_AB\.(?P<side>[01])\.weight")
OF_BASE = re.compile(r"base_model\.model\.(?P<name>.+)")
DORA = ("dora_layer", "magnitude_layer")
FORMAT_OF = {"qlora": "nf4_dq", "custom_qlora": "nf4_dq", "lora": "bf16", "custom_lora": "bf16"}
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
COMES_FROM = "give model_state_dict.safetensors of a LoRA run of AnswerDotAI/fsdp_qlora"

Pairs = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Found:
    """What a state dict holds.

    Args:
        pairs: linear in the model -> "A" and "B" -> name in the file.
        refs: name in the file -> where it lies.
        is_packed: the base beside them was 4 bit; None when there is none.
    """

    pairs: Pairs
    refs: dict[str, TensorRef]
    is_packed: bool | None


def run(options: ConvertOptions, info: ModelInfo) -> None:
    """Write the adapter.

    Args:
        options: of the command line.
        info: the base.

    Raises:
        UserError: the file holds something else (code 2), or does not fit the base (code 5).
    """
    file, out = Path(str(options.state_dict)).expanduser(), Path(str(options.out))
    found = read(file, info)
    rank = _check(found, info, file)
    record = _record(options, found)
    names = {
        f"base_model.model.{module}.lora_{side}.weight": name
        for module, sides in found.pairs.items()
        for side, name in sides.items()
    }
    nbytes = sum(found.refs[name].nbytes for name in names.values())
    with new_directory(out, nbytes) as draft:
        path, texts = draft / WEIGHTS_NAME, adapter_files.metadata(record)
        with safe_open(file, "pt") as source, SafetensorsFile(path, names, texts) as target:
            for new_name, name in names.items():
                target.add(new_name, source.get_tensor(name))
        _config(options, info, found.pairs, rank).save_pretrained(str(draft))
        adapter_files.read(draft)
        _compare(path, file, names)
    known = record["format"] or "unknown (--train_type tells)"
    print(f"written   {out}: rank {rank}, alpha {options.lora_alpha}, {len(found.pairs)} linears")
    print(f"base      {options.model_name}; in training it was {known}")


def read(file: Path, info: ModelInfo) -> Found:
    """Sort the names of a state dict.

    Args:
        file: the safetensors file.
        info: the base, whose own tensors may lie in it too.

    Returns:
        What it holds.

    Raises:
        UserError: there are names that belong to neither (code 2), or the file is damaged.
    """
    if not file.is_file():
        raise UserError(f"--state_dict {file}", "is no file", COMES_FROM)
    refs, pairs, base, unknown = read_header(file), dict[str, dict[str, str]](), [], []
    known = _names_of_base(info)
    for full in refs:
        name = WRAPPERS.sub("", full)
        match = BY_PEFT.fullmatch(name) or BY_OWN_CLASS.fullmatch(name)
        of_base = OF_BASE.fullmatch(name)
        if match:
            side = {"0": "A", "1": "B"}.get(match["side"], match["side"])
            pairs.setdefault(match["module"], {})[side] = full
        elif of_base and of_base["name"].replace(".base_layer.", ".") in known:
            base.append(full)
        else:
            unknown.append(full)
    if any(part in name for name in unknown for part in DORA):
        rule = f"{describe(unknown)}: DoRA, which is not converted yet"
        raise UserError(str(file), rule, "give the file of a LoRA run")
    if unknown:
        rule = f"{describe(unknown)}: no LoRA matrix, and no part of {info.model_type}"
        raise UserError(str(file), rule, COMES_FROM)
    if not pairs:
        raise UserError(str(file), "holds no LoRA matrices", COMES_FROM)
    packed = [refs[name].shape[-1:] == (1,) for name in base if ".base_layer.weight" in name]
    return Found(pairs, refs, any(packed) if packed else None)


def _names_of_base(info: ModelInfo) -> set[str]:
    layer = [name for name, _ in info.layer_params]
    layer += [f"{linear.name}.weight" for linear in info.linears]
    layers = (f"{info.layers_prefix}.{index}." for index in range(info.num_layers))
    names = {name for name, _ in info.root_params} | {p + name for p in layers for name in layer}
    return names | {"lm_head.weight"}  # there it is stored, tied or not


def _check(found: Found, info: ModelInfo, file: Path) -> int:
    """All matrices are there, of one rank, and fit the base; return the rank."""
    shapes = {
        f"{info.layers_prefix}.{index}.{linear.name}": (linear.out_features, linear.in_features)
        for index in range(info.num_layers)
        for linear in info.linears
    }
    ranks = set()
    for module, sides in found.pairs.items():
        if module not in shapes:
            raise UserError(f"{module} in {file}", "is no linear of --model_name", "give its base")
        if sides.keys() != {"A", "B"}:
            raise UserError(f"{module} in {file}", "has one matrix of two", COMES_FROM, INTEGRITY)
        a, b = (found.refs[sides[side]].shape for side in "AB")
        if len(a) != 2 or len(b) != 2 or (b[0], a[1]) != shapes[module] or a[0] != b[1]:
            rule = f"has matrices {list(a)} and {list(b)}, the base {list(shapes[module])}"
            raise UserError(f"{module} in {file}", rule, "give its own base", INTEGRITY)
        ranks.add(a[0])
    if len(ranks) != 1:
        raise UserError(str(file), f"has ranks {sorted(ranks)}", COMES_FROM, INTEGRITY)
    targets = _targets(found.pairs)
    lost = [name for name in shapes if _last(name) in targets and name not in found.pairs]
    if lost:
        raise UserError(str(file), f"has no LoRA matrices for {describe(lost)}", COMES_FROM, 5)
    return ranks.pop()


def _compare(path: Path, file: Path, names: dict[str, str]) -> None:
    """What was written is what was read, tensor by tensor."""
    with safe_open(path, "pt") as ours, safe_open(file, "pt") as theirs:
        wrong = [
            new_name
            for new_name, name in names.items()
            if not ours.get_tensor(new_name).equal(theirs.get_tensor(name))
        ]
    if wrong:
        rule = f"{describe(wrong)} not as written"
        raise UserError(str(path), rule, "check the disk and convert again", INTEGRITY)


def _record(options: ConvertOptions, found: Found) -> dict[str, Any]:
    """What can be known of the base in training: the file tells it by shape, or the user."""
    if options.train_type is not None:
        name = FORMAT_OF.get(options.train_type)
    else:
        name = {True: "nf4_dq", False: "bf16", None: None}[found.is_packed]
    sides = next(iter(found.pairs.values()))
    dtype = DTYPE_NAMES.get(found.refs[sides["A"]].dtype, "float32")
    base = {"base": options.model_name, "format": name, "compute_dtype": dtype}
    return {"version": __version__, **base, "converted_from": "AnswerDotAI/fsdp_qlora"}


def _config(options: ConvertOptions, info: ModelInfo, pairs: Pairs, rank: int) -> Any:
    import peft

    return peft.LoraConfig(
        r=rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=sorted(_targets(pairs)),
        base_model_name_or_path=str(info.path or options.model_name),
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _targets(pairs: Pairs) -> set[str]:
    return {_last(module) for module in pairs}


def _last(name: str) -> str:
    return name.rpartition(".")[2]
