"""The merge check: how far the merged model is from base + adapter, by logits on the same rows.

Both are computed in float32 from their weights as they are, so that nothing but the weights
differs. A module's weights are read when it runs and dropped when it has run: a model of any size
is compared in the memory of its largest tensor and of the logits.

Shape letters: B rows, T tokens, N tokens of all rows, V vocabulary, I in features, R LoRA rank.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fsdp_qlora import hardware
from fsdp_qlora.arch import ModelInfo
from fsdp_qlora.arch.info import expert_matrices, stored_name
from fsdp_qlora.config import Config, check_own_code
from fsdp_qlora.data import prepare, sources, tokenizer
from fsdp_qlora.errors import UserError
from fsdp_qlora.export.adapter import Pair, SavedAdapter, run_config
from fsdp_qlora.export.base import Reader, TrainedBase, load, load_pair, read_from
from fsdp_qlora.export.merge import MergeOptions
from fsdp_qlora.hardware import GIB

CHUNK_TOKENS = 64  # compared at once
WEIGHT_BYTES = 10  # of one number: stored, rounded and as float32
LOGITS_COPIES = 4
SEED = 0  # of random tokens


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


def run(
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
    trained = logits(
        info, read_from(info, device, seen, adapter.replaced), adapter.pairs, rows.ids, device
    )
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
        own = {key: f"{name}.{key}" for key, p in module._parameters.items() if p is not None}
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
    for key, name in own.items():
        module._parameters[key] = nn.Parameter(read(name).float(), requires_grad=False)


def _drop(module: nn.Module, args: tuple, output: Any) -> None:
    for key, param in module._parameters.items():
        if param is not None:
            module._parameters[key] = nn.Parameter(param.to("meta"), requires_grad=False)


def _add_product(pair: Pair, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    a_RI, b_OR = load_pair(pair, output.device)
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
        cfg = dataclasses.replace(Config(), dataset=options.dataset)
        return _of_data(options, cfg, adapter, info)
    if not (adapter.path / "run_config.json").is_file():
        return _random(options, info, "no run_config.json beside the adapter")
    try:
        cfg = run_config(adapter.path)
        check_own_code(vars(cfg), (), adapter.path)
        return _of_data(options, cfg, adapter, info)
    except UserError as error:
        return _random(options, info, f"the run's rows cannot be read: {error}")


def _of_data(options: MergeOptions, cfg: Config, adapter: SavedAdapter, info: ModelInfo) -> Rows:
    if cfg.dataset == sources.DUMMY:
        return _random(options, info, "the run's rows were random, too")
    path = _tokenizer_directory(adapter, info)
    ready = prepare.prepare(
        cfg, tokenizer.read(path), info.vocab_size, lambda: tokenizer.load(path)
    )
    has_held_out = len(ready.held_out) > 0
    part = ready.held_out if has_held_out else ready.train
    rows = (part[i].input_ids[: options.evidence_tokens].tolist() for i in range(len(part)))
    ids = [row for row, _ in zip(rows, range(options.evidence_rows), strict=False) if row]
    if not ids:
        raise UserError(cfg.dataset, "holds no rows to compare on", "name others with --dataset")
    kind = "held-out rows" if has_held_out else "rows, none held out,"
    return Rows(ids, f"{len(ids)} {kind} of {cfg.dataset}", True)


def _tokenizer_directory(adapter: SavedAdapter, info: ModelInfo) -> Path:
    places = [adapter.path, info.path]
    for place in places:
        if place and tokenizer.has_files(place):
            return place
    raise UserError(str(info.path), "has no tokenizer", "copy it beside the adapter")


def _random(options: MergeOptions, info: ModelInfo, why: str) -> Rows:
    shape = (options.evidence_rows, options.evidence_tokens)
    ids = np.random.default_rng(SEED).integers(0, info.vocab_size, shape).tolist()
    return Rows(ids, f"{options.evidence_rows} rows of random tokens ({why})", False)
