"""The tensors of a new model, one after the other, and the merge check.

The check says how far a merged model is from base + adapter, by logits on the same rows. Both are
computed in float32 from their weights as they are, so that nothing but the weights differs. A
module's weights are read when it runs and dropped when it has run: a model of any size is compared
in the memory of its largest tensor and of the logits.

Block expansion: behind each group of layers stands a copy of its last one whose projections into
the residual stream are zero, so that it hands on what it gets. Training moves the copies alone.

Shape letters: B rows, T tokens, N tokens of all rows, V vocabulary, H hidden, I in features, O out
features, R LoRA rank.

Source: LLaMA Pro, arXiv 2401.02415, section 3.2.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from fsdp_qlora import arch, cli, config, hardware
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import GROUP, MXFP4, QUANTIZED_ITEM_BYTES, TensorRef, read_tensors
from fsdp_qlora.data import prepare, tokenizer
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.export.adapter import TABLE, Pair, SavedAdapter, run_config
from fsdp_qlora.model import experts, quantize
from fsdp_qlora.model.skeleton import on_meta, stored_names, transformers_config
from fsdp_qlora.model.weights import DTYPES, QuantizedCache, Weights, find_cache, read_file
from fsdp_qlora.planning.sizes import NEW_LAYERS

Tensors = Iterator[tuple[str, torch.Tensor]]
Rows = tuple[list[list[int]], str, bool]  # token ids, what they are, whether they are text
# What writes into the residual stream, by its name in Llama, GPT-NeoX, GPT-2, Mixtral and kin.
INTO_RESIDUAL = {"o_proj", "down_proj", "dense", "dense_4h_to_h", "c_proj", "w2"}
FILE_NAME = re.compile(r"^~/|^\.{0,2}/\w|\w\.\w{1,5}$")  # no token that anybody means to add
MULTIPLE = 8  # of embedding rows: tensor cores want it
CHUNK_TOKENS = 64  # compared at once
WEIGHT_BYTES = 10  # of one number: stored, rounded and as float32
LOGITS_COPIES = 4
SEED = 0  # of random tokens


@dataclasses.dataclass(frozen=True)
class TrainedBase:
    """Makes of the weights in the files what training computes with.

    Args:
        info: the base.
        adapter: trained over it; what it replaces is read in place of a weight, in float32.
        dtype: what linears are dequantized to, and what all others are rounded to.
        device: where weights go; there they are quantized (the GPU's kernels are the ones that
            training on GPUs used).
        format_name: row of FORMATS that linears go through; None leaves every weight as stored.
        quant_cache: where training kept its 4-bit bytes: auto, off or a directory.
    """

    info: ModelInfo
    adapter: SavedAdapter
    dtype: torch.dtype
    device: torch.device
    format_name: str | None = None
    quant_cache: str = "off"
    _held: dict[int, quantize.LayerStore] = dataclasses.field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Refuse another format than that of the files."""
        if self.info.stored.whole and self.format_name != self.info.stored.whole:
            rule = f"is stored as {self.info.stored.whole}, not {self.format_name or 'in 16 bit'}"
            remedy = "use --base auto, or take the 16-bit original"
            raise UserError(str(self.info.path), rule, remedy)

    @cached_property
    def cached(self) -> QuantizedCache:
        """The quantized layers that training itself wrote, where they are still there."""
        setting = "off" if self.format_name is None else self.quant_cache
        return find_cache(setting, self.info, self._layouts)

    @property
    def note(self) -> str:
        """Where the quantized bytes come from, in words."""
        return f"from {self.cached.directory}" if self.cached.is_complete else "quantized anew"

    @cached_property
    def _layouts(self) -> tuple[quantize.Layout, ...]:
        return quantize.layer_layouts(self.info, self.format_name or "bf16")

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        return self.info.linear_places()

    def read_ahead(self, names: Sequence[str]) -> Iterator[torch.Tensor]:
        """Yield weights as training saw them, the next two being read meanwhile.

        Args:
            names: in the files.
        """
        has_bytes, parts = self.cached.is_complete or self.info.stored.whole, self.info.quantized
        linears = self._places.keys() - {n for n in parts if parts[n].format == MXFP4}
        known, replaced = linears if has_bytes else set(), self.adapter.replaced
        others = [name for name in names if name not in known and name not in replaced]
        read = Weights(self.info).read_ahead(others, self.device)
        for name in names:
            if name in replaced:
                yield read_float(replaced[name], self.device)
            elif name in known:
                yield self._known(name)
            elif self.format_name is None:
                yield next(read)
            elif name in linears:
                yield self._rounded(next(read))
            else:
                yield next(read).to(self.dtype)

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter by its name of stored_names: experts lie one by one in the files."""
        parts = arch.targets.expert_matrices(self.info, name) or [[name]]
        names = [part for matrix in parts for part in matrix]
        read = self.read_ahead(names)
        if len(names) == 1:
            return next(read)
        read = itertools.starmap(self.with_pair, zip(names, read, strict=True))
        whole = torch.stack([torch.cat([next(read) for _ in matrix]) for matrix in parts])
        return whole.transpose(1, 2) if self.info.tensors[names[0]].is_transposed else whole

    def with_pair(self, name: str, weight_OI: torch.Tensor) -> torch.Tensor:
        """Add to a weight what its LoRA pair makes, in float32; without one it stays as it is.

        Args:
            name: in the files.
            weight_OI: the weight.
        """
        device, own = weight_OI.device, self.info.outer_name(name.removesuffix(".weight"))
        pair, linear = self.adapter.pairs.get(own), None
        if self.adapter.experts and name in self._places and pair is None:
            layer, index = self._places[name]
            linear = self.info.by_layer[layer].linears[index]
            if linear.expert is not None:
                pair = self.adapter.expert_places.get((layer, linear.expert[2] != 2))
        if not pair:
            return weight_OI
        both = _read_once(pair.a, device), _read_once(pair.b, device)
        both = experts.pair_of_one(linear, pair.num_experts, *both) if linear is not None else both
        return torch.addmm(weight_OI.float(), both[1], both[0], alpha=pair.scale)

    def _known(self, name: str) -> torch.Tensor:
        """A weight whose quantized bytes are there."""
        layer, index = self._places[name]
        if self.info.stored.whole:
            packed = Weights(self.info).read_quantized([name], self.device, self.info.stored.whole)
            return self._dequantized(next(packed), self.info.tensors[name].shape)
        if layer not in self._held:
            self._held.clear()
            (stored,) = self.cached.read_layers([layer])
            if stored is None:
                print(f"warning   {name} in {self.cached.directory} is damaged: quantized anew")
                return self._rounded(next(Weights(self.info).read_ahead([name], self.device)))
            flat = stored.to(self.device)
            self._held[layer] = quantize.LayerStore(lambda: flat, self._layouts[layer])
        return self._held[layer].weight(index, self.dtype)

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight quantized, and dequantized again."""
        fields = quantize.FORMATS[str(self.format_name)].quantize(weight)
        return self._dequantized(fields, weight.shape)

    def _dequantized(self, fields: quantize.Fields, shape: Sequence[int]) -> torch.Tensor:
        layout = quantize.build_layout([(shape[0], shape[1])], str(self.format_name))
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=self.device)
        quantize.store_linear(flat, layout, 0, fields)
        return quantize.LayerStore(lambda: flat, layout).weight(0, self.dtype)


def read_float(ref: TensorRef, device: torch.device) -> torch.Tensor:
    """Read a tensor, float32."""
    raw = read_file(ref.file, ref.start, ref.nbytes)
    return raw.view(DTYPES[ref.dtype]).view(tuple(ref.shape)).to(device, torch.float32)


_read_once = lru_cache(maxsize=4)(read_float)  # experts of a layer share them


def with_blocks(info: ModelInfo, adapter: SavedAdapter) -> ModelInfo:
    """Let experts in MXFP4 that no adapter changes be parts that are written byte by byte.

    Args:
        info: the base.
        adapter: to be merged.

    Returns:
        The base; the same where there are no such experts.
    """
    kept = {n: i.joint for n, i in info.tensors.items() if n in info.quantized and i.joint}
    changes = bool(adapter.experts) or any(".experts." in name for name in adapter.pairs)
    if not kept or changes or info.path is None:
        return info
    there = read_tensors(info.path, QUANTIZED_ITEM_BYTES)
    blocks = {n: ref for n, ref in there.items() if n.endswith(("_blocks", "_scales"))}
    rest = {name: ref for name, ref in info.tensors.items() if name not in kept}
    return dataclasses.replace(info, tensors=rest, towers=info.towers | blocks)


def merged(base: TrainedBase, dtype: torch.dtype, names: Sequence[str]) -> Tensors:
    """Yield tensors of base + adapter; a few are held at once.

    Args:
        base: with its adapter; of DoRA, the rows get their lengths when that is added, in float32.
        names: of the tensors.
        dtype: of the results.

    Yields:
        Name and tensor, in the order of the base's files.

    Raises:
        UserError: a result is not finite (code 5).
    """
    device = base.device
    for name, weight_OI in zip(names, base.read_ahead(names), strict=True):
        weight_OI = base.with_pair(name, weight_OI)
        pair = base.adapter.pairs.get(base.info.outer_name(name.removesuffix(".weight")))
        if pair is not None and pair.magnitude is not None:
            weight_OI *= (read_float(pair.magnitude, device) / weight_OI.norm(dim=1)).unsqueeze(1)
        result = weight_OI.to(dtype)
        if not result.sum(dtype=torch.float32).isfinite():
            remedy = "use --dtype bf16" if dtype == torch.float16 else "check base and adapter"
            raise UserError(name, f"is not finite in {dtype}", remedy, INTEGRITY)
        yield name, result


def joined(info: ModelInfo, tensors: Tensors) -> Tensors:
    """Give tensors the form that they have in the files of the base.

    The matrices of experts that lie in one tensor there come together, and the other parts of a
    wrapper are added, byte by byte.

    Args:
        info: the base.
        tensors: of `merged`: those of one tensor of the files come one after the other.
    """
    refs = ((info.tensors[name], name, tensor) for name, tensor in tensors)
    outer = _outer_names(info)
    for joint, group in itertools.groupby(refs, lambda row: row[0].joint or row[1]):
        parts = [tensor.t() if ref.is_transposed else tensor for ref, _, tensor in group]
        is_part = joint not in info.tensors
        yield outer.get(joint, joint), torch.stack(parts).contiguous() if is_part else parts[0]
    names, source = list(info.towers), Weights(dataclasses.replace(info, tensors=info.towers))
    yield from zip(names, source.read_ahead(names, torch.device("cpu")), strict=True)


def file_names(info: ModelInfo) -> list[str]:
    """The names of the tensors as the files have them."""
    outer = _outer_names(info)
    own = dict.fromkeys(ref.joint or name for name, ref in info.tensors.items())
    return [*(outer.get(name, name) for name in own), *info.towers]


def _outer_names(info: ModelInfo) -> dict[str, str]:
    """Of a wrapper, name in its text half -> in the files."""
    if not info.wrapper or info.path is None:
        return {}
    stored = read_tensors(info.path, QUANTIZED_ITEM_BYTES)
    return {arch.info.inner_name(name): name for name in stored}


def quantized(info: ModelInfo, settings: Any, dtype: str | None, device: torch.device) -> Tensors:
    """Yield the tensors of a 4-bit model; a few are held at once.

    Args:
        info: the 16-bit model.
        settings: transformers.BitsAndBytesConfig.
        dtype: of all that stays, and what is quantized is rounded to; None: as stored.
        device: where it is computed.

    Yields:
        Name and tensor: of a quantized weight its codes, uint8 [weights / 2, 1], then its
        constants as bitsandbytes names them.
    """
    linears, names, bnb = info.linear_places(), list(info.tensors), quantize.import_bitsandbytes()
    how = {"blocksize": GROUP, "quant_type": settings.bnb_4bit_quant_type}
    how |= {"compress_statistics": settings.bnb_4bit_use_double_quant, "quant_storage": torch.uint8}
    for name, stored in zip(names, Weights(info).read_ahead(names, device), strict=True):
        weight = stored if dtype is None else stored.to(getattr(torch, dtype))
        if name not in linears:
            yield name, weight
            continue
        codes, state = bnb.quantize_4bit(weight, **how)
        yield name, codes
        for part, tensor in state.as_dict(packed=True).items():
            yield f"{name}.{part}", tensor


class Vocabulary(NamedTuple):
    """A tokenizer with new tokens.

    Args:
        core: `tokenizers.Tokenizer`.
        num_known: ids that meant something before; what follows has no trained row.
        num_rows: of the embeddings now.
    """

    core: Any
    num_known: int
    num_rows: int


def add_tokens(info: ModelInfo, text: str) -> Vocabulary:
    """Add tokens to the tokenizer of a model, in memory.

    Args:
        info: the model, with its files.
        text: a file with one token a line, or tokens between commas.

    Raises:
        UserError: there are none, or a token is known already (code 2).
    """
    path = Path(os.path.expanduser(text))
    is_file = len(text) < 256 and path.is_file()
    if not is_file and FILE_NAME.search(text):
        raise UserError(f"--add_tokens {text}", "is no file", "give a file, or tokens as a,b")
    parts = path.read_text(encoding="utf-8-sig").splitlines() if is_file else text.split(",")
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


class Expansion:
    """New layers between those of a model.

    Args:
        info: the model as it is.
        added: numbers of the new layers.

    Attributes:
        order: which old layer each layer of the result comes from.
        sources: (name in the old model, name in the new one, whether it is zero), in file order.

    Raises:
        UserError: what writes into the residual stream is not known by name (code 2).
    """

    def __init__(self, info: ModelInfo, added: tuple[int, ...]) -> None:
        self.info, self.added, self.order = info, added, list(range(info.num_layers))
        for number in added:
            self.order.insert(number, self.order[number - 1])
        self.sources, stem = list[tuple[str, str, bool]](), f"{info.layers_prefix}."
        for name in info.tensors:
            layer, _, rest = name.removeprefix(stem).partition(".")
            places = enumerate(self.order) if name.startswith(stem) else ()
            is_zero = not INTO_RESIDUAL.isdisjoint(rest.split("."))
            copies = [number for number, old in places if old == int(layer)]
            own = [(name, f"{stem}{n}.{rest}", is_zero and n in added) for n in copies]
            self.sources += own or [(name, name, False)]
        if sum(is_zero for _, _, is_zero in self.sources) < 2 * len(added):
            rule = f"none of {', '.join(sorted(INTO_RESIDUAL))} is in each half of its layers"
            raise UserError(f"{info.path}: {info.model_type}", rule, "expand a Llama-like model")

    def tensors(self, vocabulary: Vocabulary | None) -> Tensors:
        """Yield the tensors of the expanded model; one is held at once.

        Args:
            vocabulary: gives embedding and head more rows.
        """
        ends = {name for name, shape in self.info.root_params if shape[0] == self.info.vocab_size}
        read = Weights(self.info).read_ahead(list(self.info.tensors), torch.device("cpu"))
        for old, group in itertools.groupby(self.sources, lambda source: source[0]):
            tensor = next(read)
            if vocabulary is not None and old in ends:  # new rows: the mean of the known ones
                known = tensor[: vocabulary.num_known]
                mean_H = known.mean(0, dtype=torch.float32).to(known.dtype)
                tensor = torch.cat([known, mean_H.expand(vocabulary.num_rows - len(known), -1)])
            for _, new, is_zero in group:
                yield new, torch.zeros_like(tensor) if is_zero else tensor

    def changes(self) -> dict[str, Any]:
        """What config.json must say of new layers; lists of one entry a layer grow with them."""
        if not self.added:
            return {}
        found = {"num_hidden_layers": len(self.order), NEW_LAYERS: list(self.added)}
        for key, values in transformers_config(self.info).to_dict().items():
            if isinstance(values, list) and len(values) == self.info.num_layers:
                found[key] = [values[old] for old in self.order]
        return found


def check(seen: TrainedBase, result: TrainedBase, options: Any) -> dict[str, Any]:
    """Compare a merged model with base + adapter as trained.

    Args:
        seen: the base as training saw it, and the adapter.
        result: the merged model, as stored.
        options: how many rows to compare on, tokens of the longest, where they come from: see
            commands.CheckOptions.

    Returns:
        For merge.json, see `compare`; or why there is none, as "skipped".

    Raises:
        UserError: the data set asked for cannot be read.
    """
    if not options.evidence_rows:
        return {"skipped": "--evidence_rows 0"}
    info, device, shape = seen.info, seen.device, (options.evidence_rows, options.evidence_tokens)
    num_experts = sum(linear.expert is not None for linear in info.linears)
    largest = max(ref.nbytes for ref in info.tensors.values()) * max(num_experts, 1)
    logits_bytes = math.prod(shape) * info.vocab_size * 4 * LOGITS_COPIES
    need_gib = (largest * WEIGHT_BYTES // 2 + logits_bytes) / hardware.GIB
    free_gib = hardware.host_limit_gib() - hardware.host_used_gib()
    if device.type == "cuda":
        free_gib = torch.cuda.mem_get_info(device)[0] / hardware.GIB
    if need_gib > free_gib:
        why = f"needs {need_gib:.1f} GiB, {free_gib:.1f} GiB of {device.type} memory are free"
        return {"skipped": f"{why}; fewer --evidence_rows or --evidence_tokens need less"}
    ids, note, is_text = choose_rows(seen, shape, options.dataset)
    with cli.Progress("compares", 2 * info.num_layers, "layers") as progress:
        trained, merged = (logits(base, ids, progress.update) for base in (seen, result))
    base = seen.format_name or "as stored: the adapter does not tell what training saw"
    has_run = seen.adapter.pairs or seen.adapter.experts or seen.adapter.replaced
    known = {"base_of_adapter": base} if has_run else {}
    return {"rows": note} | known | compare(trained, merged, ids, is_text)


@torch.inference_mode()
def logits(base: TrainedBase, ids: list[list[int]], tell: Callable[[], Any] = bool) -> torch.Tensor:
    """Run a model whose weights are read as they are needed.

    Args:
        base: what the model is, its weights and its adapter.
        ids: rows of tokens.
        tell: is called after every layer.

    Returns:
        logits_NV of the rows, one after the other, float32 on the host.
    """
    model = on_meta(transformers_config(base.info), torch.float32, "eager").float().eval()
    embedding, stored = model.get_input_embeddings(), stored_names(model, base.info)
    embedded = next(name for name, module in model.named_modules() if module is embedding)
    # What has a convolution hands the weights of its parts to kernels of its own.
    has_conv = [n for n, m in model.named_modules() if nn.Conv1d in map(type, m.children())]
    for name, module in model.named_modules():
        for part, buffer in module._buffers.items():
            at = stored.get(f"{name}.{part}")
            if buffer is not None:
                module._buffers[part] = base.read(at) if at else buffer.to(base.device)
        if pair := base.adapter.pairs.get(base.info.outer_name(name)):
            module.register_forward_hook(partial(_add_product, pair))
        params = [part for part, param in module._parameters.items() if param is not None]
        own = {part: stored[f"{name}.{part}"] for part in params}
        if base.info.is_tied and module is model.get_output_embeddings():
            own["weight"] = stored[f"{embedded}.weight"]
        if own:
            reader = next((n for n in has_conv if name.startswith(f"{n}.")), name)
            if module is embedding and base.info.model_type == arch.targets.TURNED:
                reader = ""  # it is asked before it runs
            holder = model.get_submodule(reader)
            holder.register_forward_pre_hook(partial(_bring, own, base, module))
            holder.register_forward_hook(partial(_drop, module))
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList))
    for layer in next((m for m in lists if len(m) == base.info.num_layers), ()):
        layer.register_forward_hook(partial(_leave_layer, tell))
    # Causal: the padding behind is not seen.
    batch_BT = nn.utils.rnn.pad_sequence(list(map(torch.tensor, ids)), batch_first=True)
    out = model(input_ids=batch_BT.to(base.device), use_cache=False).logits
    return torch.cat([out[i, : len(tokens)].cpu() for i, tokens in enumerate(ids)])


def _bring(own: dict[str, str], base: TrainedBase, module: nn.Module, *_: Any) -> None:
    for part, name in own.items():
        module._parameters[part] = nn.Parameter(base.read(name).float(), requires_grad=False)


def _leave_layer(tell: Callable[[], Any], *_: Any) -> None:
    tell()
    hardware.release_freed_memory()  # that reading threads have freed: else all layers add up


def _drop(module: nn.Module, *_: Any) -> None:
    for part, param in module._parameters.items():
        if param is not None:
            module._parameters[part] = nn.Parameter(param.to("meta"), requires_grad=False)


def _add_product(pair: Pair, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    a_RI, b_OR = read_float(pair.a, output.device), read_float(pair.b, output.device)
    output = output + pair.scale * (args[0] @ a_RI.t() @ b_OR.t())
    if pair.magnitude is None:
        return output
    weight_OI, bias_O = module.get_parameter("weight"), module._parameters.get("bias")
    norm_O = (weight_OI + pair.scale * b_OR @ a_RI).norm(dim=1)
    own_O = torch.zeros_like(norm_O) if bias_O is None else bias_O.detach()
    return (output - own_O) * (read_float(pair.magnitude, output.device) / norm_O) + own_O


def compare(
    trained_NV: torch.Tensor, merged_NV: torch.Tensor, ids: list[list[int]], is_text: bool
) -> dict[str, Any]:
    """Say how far logits are apart.

    Args:
        trained_NV: of base + adapter.
        merged_NV: of the merged model.
        ids: the rows that they were computed on.
        is_text: the rows are text, so that their loss means something.

    Returns:
        num_tokens; max_difference of any logit; kl_nats, the mean over tokens of the divergence of
        the merged model's next-token distribution from the trained one's; top1_agreement, the
        share of tokens for which both find the same one likeliest; of text also both losses.
    """
    targets = torch.tensor([t for row in ids for t in (*row[1:], -1)])
    largest, divergence, num_agreed = 0.0, 0.0, 0
    losses = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(targets), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        both = torch.stack([trained_NV[part], merged_NV[part]]).double()
        largest, likeliest = max(largest, (both[0] - both[1]).abs().max().item()), both.argmax(-1)
        num_agreed += int((likeliest[0] == likeliest[1]).sum())
        logs = both.log_softmax(-1)
        divergence += (logs[0].exp() * (logs[0] - logs[1])).sum().item()
        chosen = targets[part].clamp(min=0).view(1, -1, 1).expand(2, -1, 1)
        losses -= (logs.gather(-1, chosen).squeeze(-1) * (targets[part] >= 0)).sum(1)
    facts = {"num_rows": len(ids), "num_tokens": len(targets), "max_difference": largest}
    facts |= {"kl_nats": divergence / len(targets), "top1_agreement": num_agreed / len(targets)}
    if is_text:
        means = (losses / int((targets >= 0).sum())).tolist()
        facts |= {"loss_trained": means[0], "loss_merged": means[1]}
    return facts


def lines(facts: dict[str, Any], both: str = "merged against base + adapter") -> str:
    """Show the merge check on the console.

    Args:
        facts: what `check` returned.
        both: what was compared.
    """
    if "skipped" in facts:
        return f"check     skipped: {facts['skipped']}"
    base = f"; base {facts['base_of_adapter']}" if "base_of_adapter" in facts else ""
    text = TABLE["check"] + TABLE["check_loss"] * ("loss_trained" in facts)
    return text.format_map(facts | {"base": base, "both": both})


def choose_rows(base: TrainedBase, shape: tuple[int, int], dataset: str | None) -> Rows:
    """Take the rows that the run held out, else some that it learned, else English, else any ids.

    Args:
        base: with the adapter whose run it was.
        shape: (rows, tokens of the longest).
        dataset: where they come from; None: the run's.

    Returns:
        The rows.

    Raises:
        UserError: `dataset` cannot be read.
    """
    if dataset is not None:
        return _rows_of_data(config.TrainConfig(dataset=dataset), base, shape)
    path, has_run = base.adapter.path, base.adapter.pairs or base.adapter.replaced
    why = "no run_config.json beside the adapter" if has_run else "--dataset takes your own"
    try:
        if (run := run_config(path)) is not None:
            config.check_own_code(vars(run), (), path)
            return _rows_of_data(run, base, shape)
    except UserError as error:
        why = f"the run's rows cannot be read: {error}"
    with contextlib.suppress(UserError, ImportError):
        from pydoc_data.topics import topics  # text that is there wherever Python is

        texts = sorted(topics.values(), key=len)[-shape[0] :]
        encoded = _tokenizer(base).encode([text[: 16 * shape[1]] for text in texts], True)
        ids = [row.ids[: shape[1]] for row in encoded if len(row.ids) > 1]
        if 0 < max(map(max, ids), default=0) < base.info.vocab_size:
            return ids, f"{len(ids)} rows of Python's documentation ({why})", True
    ids = np.random.default_rng(SEED).integers(0, base.info.vocab_size, shape).tolist()
    return ids, f"{shape[0]} rows of random tokens ({why})", False


def _tokenizer(base: TrainedBase) -> tokenizer.TextTokenizer:
    path = base.adapter.path
    return tokenizer.read(path if tokenizer.has_files(path) else tokenizer.directory(base.info))


def _rows_of_data(cfg: config.TrainConfig, base: TrainedBase, shape: tuple[int, int]) -> Rows:
    ready = prepare.prepare(cfg, _tokenizer(base), base.info.vocab_size)
    part, kind = ready.held_out, "held-out rows"
    if not len(part):
        part, kind = ready.train, "rows, none held out,"
    ids = [part[i].input_ids[: shape[1]].tolist() for i in range(min(shape[0], len(part)))]
    return ids, f"{len(ids)} {kind} of {cfg.dataset}", True
