"""The arithmetic of `merge`: base weights as training saw them, the sum, and the merge check.

The check says how far the merged model is from base + adapter, by logits on the same rows. Both are
computed in float32 from their weights as they are, so that nothing but the weights differs. A
module's weights are read when it runs and dropped when it has run: a model of any size is compared
in the memory of its largest tensor and of the logits.

Shape letters: B rows, T tokens, N tokens of all rows, V vocabulary, I in features, O out features,
R LoRA rank.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from fsdp_qlora import atomic, hardware
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.files import TensorRef, read_json
from fsdp_qlora.arch.info import expert_matrices, stored_name
from fsdp_qlora.config import TrainConfig, check_own_code
from fsdp_qlora.data import prepare, sources, tokenizer
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.export.adapter import Pair, SavedAdapter, run_config
from fsdp_qlora.export.merge import MergeOptions
from fsdp_qlora.export.model_files import DTYPES as DTYPE_NAMES
from fsdp_qlora.export.model_files import GIB, linear_names
from fsdp_qlora.model.layer import LayerCache, LayerStore, Layout, build_layout, store_linear
from fsdp_qlora.model.load import QuantizedCache, key
from fsdp_qlora.model.quantize import FORMATS, Fields
from fsdp_qlora.model.weights import DTYPES, Weights, read_file

Reader = Callable[[str], torch.Tensor]
CHUNK_TOKENS = 64  # compared at once
WEIGHT_BYTES = 10  # of one number: stored, rounded and as float32
LOGITS_COPIES = 4
SEED = 0  # of random tokens


class TrainedBase:
    """Makes of a weight in the files what training computes with.

    Attributes:
        format_name: row of FORMATS that linears go through; None leaves every weight as stored.
        dtype: what they are dequantized to, and what all others are rounded to.
        cached: the quantized layers that training itself wrote, where they are still there.
        note: where the quantized bytes come from, in words.
    """

    def __init__(
        self, info: ModelInfo, format_name: str | None, dtype: torch.dtype, quant_cache: str
    ) -> None:
        """Look for the quantized layers of the model.

        Args:
            info: the base.
            format_name, dtype: see the class.
            quant_cache: auto, off or a directory, see train.py.
        """
        self.format_name, self.dtype = format_name, dtype
        self._linears = linear_names(info)
        self._order = {linear.name: index for index, linear in enumerate(info.linears)}
        self._prefix = f"{info.layers_prefix}."
        self.cached: QuantizedCache | None = None
        self.note = "quantized anew"
        self._layer = -1
        self._store: LayerStore | None = None
        if format_name is not None:
            shapes = [(linear.out_features, linear.in_features) for linear in info.linears]
            self._layout = build_layout(shapes, format_name)
            self.cached = find_cached(info, self._layout, quant_cache)
            self.note = f"from {self.cached.directory}" if self.cached else self.note
        self._stored = Weights(info) if info.quantized else None
        if self._stored is not None and format_name != info.stored_format:
            rule = f"is stored as {info.stored_format}, not {format_name or 'in 16 bit'}"
            raise UserError(str(info.path), rule, "use --base auto, or take the 16-bit original")

    def needs(self, name: str) -> bool:
        """Whether the weight in the files is needed to make what training saw of it."""
        return name not in self._linears or (self.cached is None and self._stored is None)

    def __call__(
        self, name: str, weight: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """Round a weight as training did.

        Args:
            name: in the files.
            weight: as stored; None where it is not needed. Where it lies it is quantized (the
                GPU's kernels are the ones that training on GPUs used).
            device: of the result.

        Returns:
            The weight, in `dtype`; untouched without a format.

        Raises:
            UserError: a cached layer is damaged (code 5).
        """
        if weight is None and self._stored is not None:
            packed = self._stored.read_quantized([name], device)
            assert packed is not None
            return self._dequantized(next(packed), self._stored.info.tensors[name].shape, device)
        if weight is None:
            return self._from_cache(name, device)
        if self.format_name is None:
            return weight
        if name not in self._linears:
            return weight.to(self.dtype)
        fields = FORMATS[self.format_name].quantize(weight)
        return self._dequantized(fields, weight.shape, weight.device)

    def _dequantized(
        self, fields: Fields, shape: Sequence[int], device: torch.device
    ) -> torch.Tensor:
        layout = build_layout([(shape[0], shape[1])], str(self.format_name))
        flat = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
        store_linear(flat, layout, 0, fields)
        return LayerStore(lambda: flat, layout, LayerCache()).weight(0, self.dtype)

    def _from_cache(self, name: str, device: torch.device) -> torch.Tensor:
        number, _, rest = name.removeprefix(self._prefix).partition(".")
        if self._store is None or self._layer != int(number):
            assert self.cached is not None
            (packed,) = self.cached.read_layers([int(number)])
            flat = packed.to(device)
            self._layer = int(number)
            self._store = LayerStore(lambda: flat, self._layout, LayerCache())
        return self._store.weight(self._order[rest.removesuffix(".weight")], self.dtype)


def find_cached(info: ModelInfo, layout: Layout, quant_cache: str) -> QuantizedCache | None:
    """Find the quantized layers that a training run has left on this machine.

    Args:
        info: the base.
        layout: of a layer.
        quant_cache: auto, off or a directory, see train.py.

    Returns:
        The layers, verified as they are read; None when they are not there.

    Raises:
        UserError: what is there does not describe this model (code 5).
    """
    if quant_cache == "off" or layout.format_name == "bf16":
        return None
    directory = atomic.cache_dir(quant_cache) / key(info, layout)
    if not (directory / "manifest.json").exists():
        return None
    digests = read_json(directory / "manifest.json").get("sha256", [])
    if len(digests) != info.num_layers:
        rule = f"holds {len(digests)} layers, the model has {info.num_layers}"
        raise UserError(str(directory), rule, "delete it, or use --quant_cache off", INTEGRITY)
    return QuantizedCache(directory, "", layout.nbytes, True, dict(enumerate(digests)))


def read_from(
    info: ModelInfo,
    device: torch.device,
    rounding: TrainedBase | None = None,
    replaced: Mapping[str, TensorRef] = MappingProxyType({}),
) -> Reader:
    """Make a function that reads a weight by name.

    Args:
        info: with the places of its tensors.
        device: where they go.
        rounding: what becomes of them; None leaves them as stored.
        replaced: by name, what is read in place of them.

    Returns:
        Name -> weight.
    """
    source = Weights(info)

    def read(name: str) -> torch.Tensor:
        if name in replaced:
            return load(replaced[name], device)
        if rounding is not None and not rounding.needs(name):
            return rounding(name, None, device)
        (weight,) = source.read_ahead([name], device)
        return weight if rounding is None else rounding(name, weight, device)

    return read


def add_pair(weight_OI: torch.Tensor, pair: Pair, device: torch.device) -> torch.Tensor:
    """Add LoRA matrices to a weight; of DoRA, give its rows their lengths then.

    Args:
        weight_OI: of the base.
        pair: of this linear.
        device: where it is computed.

    Returns:
        The sum, float32.
    """
    a_RI, b_OR = load(pair.a, device), load(pair.b, device)
    weight_OI = torch.addmm(weight_OI.float(), b_OR, a_RI, alpha=pair.scale)
    if pair.magnitude is not None:
        weight_OI *= (load(pair.magnitude, device) / weight_OI.norm(dim=1)).unsqueeze(1)
    return weight_OI


def load(ref: TensorRef, device: torch.device) -> torch.Tensor:
    """Read a tensor, float32."""
    raw = read_file(ref.file, ref.start, ref.nbytes)
    return raw.view(DTYPES[ref.dtype]).view(tuple(ref.shape)).to(device, torch.float32)


def merged(
    info: ModelInfo, adapter: SavedAdapter, added_to: TrainedBase, dtype: str, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of base + adapter; a few are held at once.

    Args:
        info: the base.
        adapter: added to it.
        added_to: gives the base's weights.
        dtype: bf16, fp16 or fp32, of the results.
        device: where it is computed.

    Yields:
        Name and tensor, in the order of the base's files.

    Raises:
        UserError: a result is not finite (code 5).
    """
    kept = [name for name in info.tensors if name not in adapter.replaced]
    read = Weights(info).read_ahead(list(filter(added_to.needs, kept)), device)
    for name in info.tensors:
        if name in adapter.replaced:
            weight = load(adapter.replaced[name], device)
        else:
            weight = added_to(name, next(read) if added_to.needs(name) else None, device)
        pair = adapter.pairs.get(name.removesuffix(".weight"))
        if pair is not None:
            weight = add_pair(weight, pair, device)
        result = weight.to(getattr(torch, DTYPE_NAMES[dtype]))
        if not result.sum(dtype=torch.float32).isfinite():
            remedy = "use --dtype bf16" if dtype == "fp16" else "check base and adapter"
            raise UserError(name, f"is not finite in {result.dtype}", remedy, INTEGRITY)
        yield name, result


@dataclass(frozen=True)
class Rows:
    """Token ids to compare on.

    Args:
        ids: one list each.
        note: what they are, in words.
        is_text: they are text, so that their loss means something.
    """

    ids: list[list[int]]
    note: str
    is_text: bool


def check(
    options: MergeOptions,
    adapter: SavedAdapter,
    info: ModelInfo,
    seen: TrainedBase,
    result: ModelInfo,
    device: torch.device,
) -> dict[str, Any]:
    """Compare a merged model with base + adapter as trained.

    Args:
        options: evidence_rows, evidence_tokens, dataset.
        adapter: what was merged.
        info: the base.
        seen: what training saw of it.
        result: the merged model, with the places of its tensors.
        device: where to compute.

    Returns:
        For merge.json, see `compare`; or why there is none, as "skipped".

    Raises:
        UserError: the data set asked for cannot be read.
    """
    if not options.evidence_rows:
        return {"skipped": "--evidence_rows 0"}
    need_gib = _need_bytes(options, info) / GIB
    free_gib = _free_gib(device)
    if free_gib is not None and need_gib > free_gib:
        why = f"needs {need_gib:.1f} GiB, {free_gib:.1f} GiB of {device.type} memory are free"
        return {"skipped": f"{why}; fewer --evidence_rows or --evidence_tokens need less"}
    rows = choose_rows(options, adapter, info)
    read = read_from(info, device, seen, adapter.replaced)
    trained = logits(info, read, adapter.pairs, rows.ids, device)
    merged = logits(result, read_from(result, device), {}, rows.ids, device)
    base = seen.format_name or "as stored: the adapter does not tell what training saw"
    return {"rows": rows.note, "base_of_adapter": base} | compare(trained, merged, rows)


def _need_bytes(options: MergeOptions, info: ModelInfo) -> int:
    largest = max(ref.nbytes for ref in info.tensors.values())
    largest *= max(sum(linear.expert is not None for linear in info.linears), 1)
    num_logits = options.evidence_rows * options.evidence_tokens * info.vocab_size
    return largest * WEIGHT_BYTES // 2 + num_logits * 4 * LOGITS_COPIES


def _free_gib(device: torch.device) -> float | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    limit_gib, used_gib = hardware.host_limit_gib(), hardware.host_used_gib()
    return None if limit_gib is None or used_gib is None else limit_gib - used_gib


@torch.inference_mode()
def logits(
    info: ModelInfo,
    read: Reader,
    pairs: Mapping[str, Pair],
    ids: list[list[int]],
    device: torch.device,
) -> torch.Tensor:
    """Run a model whose weights are read as they are needed.

    Args:
        info: what the model is.
        read: gives its weights.
        pairs: LoRA matrices by the name of their linear; empty for a merged model.
        ids: rows of tokens.
        device: where to compute.

    Returns:
        logits_NV of the rows, one after the other, float32 on the host.
    """
    model = _build(info).to(dtype=torch.float32).eval()
    embedding = model.get_input_embeddings()
    embedded = next(name for name, module in model.named_modules() if module is embedding)
    for name, module in model.named_modules():
        module._buffers.update({k: b.to(device) for k, b in module._buffers.items()})
        if name in pairs:
            module.register_forward_hook(partial(_add_product, pairs[name]))
        own = {part: f"{name}.{part}" for part, p in module._parameters.items() if p is not None}
        if info.is_tied and own.get("weight") == "lm_head.weight":
            own["weight"] = f"{embedded}.weight"
        if own:
            module.register_forward_pre_hook(partial(_bring, own, partial(_read, info, read)))
            module.register_forward_hook(_drop)
    batch_BT = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.int64)
    for row, tokens in zip(batch_BT, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)  # causal: the padding behind is not seen
    out = model(input_ids=batch_BT.to(device), use_cache=False).logits
    return torch.cat([out[i, : len(tokens)].cpu() for i, tokens in enumerate(ids)])


def _build(info: ModelInfo) -> Any:
    """The model as transformers has it, its weights on the meta device."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = AutoConfig.for_model(**info.config)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )


def _read(info: ModelInfo, read: Reader, name: str) -> torch.Tensor:
    """A parameter by its name in the model: experts lie one by one in the files."""
    matrices = expert_matrices(info, name)
    if not matrices:
        return read(stored_name(info, name))
    return torch.stack([torch.cat([read(part) for part in parts]) for parts in matrices])


def _bring(own: dict[str, str], read: Reader, module: nn.Module, args: tuple) -> None:
    for part, name in own.items():
        module._parameters[part] = nn.Parameter(read(name).float(), requires_grad=False)


def _drop(module: nn.Module, args: tuple, output: Any) -> None:
    for part, param in module._parameters.items():
        if param is not None:
            module._parameters[part] = nn.Parameter(param.to("meta"), requires_grad=False)


def _add_product(pair: Pair, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    a_RI, b_OR = load(pair.a, output.device), load(pair.b, output.device)
    output = output + pair.scale * (args[0] @ a_RI.t() @ b_OR.t())
    if pair.magnitude is None:
        return output
    weight_OI, bias_O = module.get_parameter("weight"), module._parameters.get("bias")
    norm_O = (weight_OI + pair.scale * b_OR @ a_RI).norm(dim=1)
    own_O = torch.zeros_like(norm_O) if bias_O is None else bias_O.detach()
    return (output - own_O) * (load(pair.magnitude, output.device) / norm_O) + own_O


def compare(trained_NV: torch.Tensor, merged_NV: torch.Tensor, rows: Rows) -> dict[str, Any]:
    """Say how far logits are apart.

    Args:
        trained_NV: of base + adapter.
        merged_NV: of the merged model.
        rows: what they were computed on.

    Returns:
        num_tokens; max_difference of any logit; kl_nats, the mean over tokens of the divergence of
        the merged model's next-token distribution from the trained one's; top1_agreement, the
        share of tokens for which both find the same one likeliest; of text also both losses.
    """
    targets = torch.tensor([t for row in rows.ids for t in (*row[1:], -1)])
    largest, divergence, num_agreed = 0.0, 0.0, 0
    losses = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(targets), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        trained, merged = trained_NV[part].double(), merged_NV[part].double()
        largest = max(largest, (trained - merged).abs().max().item())
        num_agreed += int((trained.argmax(-1) == merged.argmax(-1)).sum())
        logs = torch.stack([trained.log_softmax(-1), merged.log_softmax(-1)])
        divergence += (logs[0].exp() * (logs[0] - logs[1])).sum().item()
        is_asked = targets[part] >= 0
        chosen = targets[part].clamp(min=0).view(1, -1, 1).expand(2, -1, 1)
        losses -= (logs.gather(-1, chosen).squeeze(-1) * is_asked).sum(1)
    num_tokens = len(targets)
    facts = {
        "num_rows": len(rows.ids),
        "num_tokens": num_tokens,
        "max_difference": largest,
        "kl_nats": divergence / num_tokens,
        "top1_agreement": num_agreed / num_tokens,
    }
    if rows.is_text:
        means = (losses / int((targets >= 0).sum())).tolist()
        facts |= {"loss_trained": means[0], "loss_merged": means[1]}
    return facts


def lines(facts: dict[str, Any]) -> list[str]:
    """Show the merge check on the console.

    Args:
        facts: what `run` returned.

    Returns:
        Lines.
    """
    if "skipped" in facts:
        return [f"check     skipped: {facts['skipped']}"]
    shown = [
        f"check     {facts['num_tokens']} tokens, {facts['rows']}; base {facts['base_of_adapter']}",
        f"          merged against base + adapter: logits differ by at most "
        f"{facts['max_difference']:.3g}, KL {facts['kl_nats']:.2g} nats a token, "
        f"the same likeliest token in {facts['top1_agreement']:.2%}",
    ]
    if "loss_trained" in facts:
        both = f"{facts['loss_trained']:.4f} -> {facts['loss_merged']:.4f}"
        shown.append(f"          loss on these rows {both}")
    return shown


def choose_rows(options: MergeOptions, adapter: SavedAdapter, info: ModelInfo) -> Rows:
    """Take the rows that the run held out, else some that it learned, else random tokens.

    Args:
        options: evidence_rows, evidence_tokens, dataset.
        adapter: whose run it was.
        info: the base.

    Returns:
        The rows, with what they are in words.

    Raises:
        UserError: the data set asked for with --dataset cannot be read.
    """
    if options.dataset is not None:
        cfg = dataclasses.replace(TrainConfig(), dataset=options.dataset)
        return _of_data(options, cfg, adapter, info)
    if not (adapter.path / "run_config.json").is_file():
        return _random(options, info, "no run_config.json beside the adapter")
    try:
        cfg = run_config(adapter.path)
        check_own_code(vars(cfg), (), adapter.path)
        return _of_data(options, cfg, adapter, info)
    except UserError as error:
        return _random(options, info, f"the run's rows cannot be read: {error}")


def _of_data(
    options: MergeOptions, cfg: TrainConfig, adapter: SavedAdapter, info: ModelInfo
) -> Rows:
    if cfg.dataset == sources.DUMMY:
        return _random(options, info, "the run's rows were random, too")
    text = tokenizer.read(_tokenizer_directory(adapter, info))
    ready = prepare.prepare(cfg, text, info.vocab_size)
    has_held_out = len(ready.held_out) > 0
    part = ready.held_out if has_held_out else ready.train
    rows = (part[i].input_ids[: options.evidence_tokens].tolist() for i in range(len(part)))
    ids = [row for row, _ in zip(rows, range(options.evidence_rows), strict=False) if row]
    if not ids:
        raise UserError(cfg.dataset, "holds no rows to compare on", "name others with --dataset")
    kind = "held-out rows" if has_held_out else "rows, none held out,"
    return Rows(ids, f"{len(ids)} {kind} of {cfg.dataset}", True)


def _tokenizer_directory(adapter: SavedAdapter, info: ModelInfo) -> Path:
    for place in (adapter.path, info.path):
        if place and tokenizer.has_files(place):
            return place
    raise UserError(str(info.path), "has no tokenizer", "copy it beside the adapter")


def _random(options: MergeOptions, info: ModelInfo, why: str) -> Rows:
    shape = (options.evidence_rows, options.evidence_tokens)
    ids = np.random.default_rng(SEED).integers(0, info.vocab_size, shape).tolist()
    return Rows(ids, f"{options.evidence_rows} rows of random tokens ({why})", False)
