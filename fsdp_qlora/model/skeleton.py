"""The model without bytes: transformers builds it on the meta device, its layers become ours.

Kernels are chosen here: dtype, attention, and Liger's fused RMSNorm, RoPE, SwiGLU where they help.
"""

import contextlib
import copy
import dataclasses
import importlib.util
import json
import logging
import math
import sys
from collections import UserDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions

from fsdp_qlora.arch import LayerKind, ModelInfo
from fsdp_qlora.arch.info import INDEXED
from fsdp_qlora.arch.targets import stored_name
from fsdp_qlora.config import DISK, TrainConfig
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, UserError, one_line_of, printable
from fsdp_qlora.model import lora, visit
from fsdp_qlora.model.attention import MASKED, PLAIN, TRIAL, KnownAttention, register
from fsdp_qlora.model.cuda_graphs import choose as choose_graphs
from fsdp_qlora.model.experts import OTHER_MODEL, QuantizedExperts, replace_experts
from fsdp_qlora.model.head import LossHead
from fsdp_qlora.model.layer import DecoderBlock, Offload, TrainedLayer
from fsdp_qlora.model.quantize import LayerCache, LayerStore, Layout, layer_layouts
from fsdp_qlora.planning.sizes import MIN_TOKENS_8_BIT, is_eager, trained_whole, whole_layer_bytes

LARGE = 2**26  # elements: more than any table that a model makes for itself

# Where 8 bit gains, by compute capability: Ampere and Ada, Hopper, data-centre Blackwell, GeForce.
MAJORS = {"fp8": (9, 10), "int8": (8, 9, 12), "fp16": (8, 9, 12)}


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What a run computes with.

    Attributes:
        dtype: of matmuls and activations.
        attention: transformers' name of the implementation.
        has_row_kernel: flash attention over rows that lie one after the other runs on the device.
            On a CPU, which makes masks of windows, for sinks and for cut rows, where asked.
        use_liger: exchange RMSNorm, RoPE and SwiGLU for Liger's.
        matmul: row of matmul.CODES of large frozen matmuls, or "bf16".
        note: one line for the user, with the reasons.
    """

    dtype: torch.dtype
    attention: str
    use_liger: bool
    has_row_kernel: bool
    matmul: str
    note: str


def choose_kernels(cfg: TrainConfig, device: torch.device, extra: str) -> KernelChoice:
    """Resolve `--attn` and `--liger` for a device.

    flash-attn serves where it is installed and there is a GPU, else SDPA, which runs PyTorch's own
    flash kernel.

    Args:
        cfg: attn, liger, compute_dtype.
        device: where the run computes.
        extra: ModelInfo.attention_extra, which SDPA leaves out.
    """
    has_gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if has_gpu else (0, 0)
    has_rows = capability >= (8, 0) and cfg.compute_dtype != "float32"
    attention, attention_why = cfg.attn, "as asked"
    if cfg.attn == "auto":
        is_installed = has_gpu and importlib.util.find_spec("flash_attn") is not None
        has_flash = is_installed and extra in ("", "soft-capped")
        attention = "eager" if is_eager(cfg, extra, "cuda" if has_rows else "cpu") else "sdpa"
        attention = "flash_attention_2" if has_flash and cfg.context_parallel == 1 else attention
        missing = "flash-attn not installed" if has_gpu else "no GPU"
        attention_why = ("installed" if is_installed else missing) + f", {extra}" * bool(extra)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    use_liger = cfg.liger == "auto" and has_gpu and has_liger
    liger_why = "as asked" if cfg.liger == "off" else "not installed" if has_gpu else "no GPU"
    note = f"{cfg.compute_dtype}, attention {attention} ({attention_why}), Liger "
    note += "on" if use_liger else f"off ({liger_why})"
    if (context := cfg.context_parallel) > 1:
        note += f", rows cut over {cfg.context_parallel} ranks"
        if has_gpu and not has_rows:
            rule = "the kernel for cut rows needs 16 bit and a GPU of 2020 (Ampere) or newer"
            got = f"--context_parallel {cfg.context_parallel}"
            raise UserError(got, rule, "use --context_parallel 1", ENVIRONMENT)
    majors = MAJORS.get(cfg.matmul, ())
    if majors and has_gpu and capability[0] not in majors:
        rule = f"{torch.cuda.get_device_name(device)} gains nothing by it: GPUs of compute "
        rule += f"capability {', '.join(map(str, majors))} do"
        raise UserError(f"--matmul {cfg.matmul}", rule, "use --matmul bf16", ENVIRONMENT)
    if majors:
        note += f", frozen matmuls of {MIN_TOKENS_8_BIT:,} tokens and more in {cfg.matmul}"
    way, dtype = cfg.matmul if majors else "bf16", getattr(torch, cfg.compute_dtype)
    has_rows |= not has_gpu and attention == "sdpa" and (extra == "sinks" or context > 1)
    return KernelChoice(dtype, attention, use_liger, has_rows, way, note)


def apply_liger(hf_model: PreTrainedModel) -> None:
    """Let Liger's own API exchange the kernels of a transformers model.

    The loss stays ours: its head is sharded in a group of its own. Which of RMSNorm, RoPE, SwiGLU
    or GeGLU are exchanged is Liger's choice for the type.

    Args:
        hf_model: changed in place; left alone where Liger does not know its type.
    """
    # Liger warns of every backend that it cannot import.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction as GateAndUp
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    own = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    kinds = set(map(type, hf_model.modules()))  # its kernels know one activation each
    words = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}
    # It scales the output of an MLP, but not its bias (Falcon-H1).
    is_off = hasattr(hf_model.config, "mlp_multipliers") and vars(hf_model.config).get("mlp_bias")
    own |= {word: False for word, act in words.items() if is_off or type(ACT2FN[act]) not in kinds}
    files = {sys.modules[type(module).__module__] for module in hf_model.modules()}
    own_kinds = [(file, kind) for file in files for kind in vars(file).items()]
    # A mixture whose first layers are dense; a type that its release has only half of.
    with contextlib.suppress(AttributeError, ImportError):
        _apply_liger_kernel_to_instance(model=hf_model, **own)
    for module in hf_model.modules():  # experts, whose gate and up are one
        origin = getattr(getattr(type(module), "_apply_gate", None), "__module__", "")
        if origin.endswith("integrations.moe") and type(module.act_fn) is type(ACT2FN["silu"]):
            vars(module)["_apply_gate"] = lambda both: GateAndUp.apply(both, True)
    for file, (name, kind) in own_kinds:  # the next model would be built of those in their place
        if isinstance(kind, type):
            setattr(file, name, kind)


class QuantizedModel(nn.Module):
    """A causal language model over quantized layers.

    Attributes:
        decoder: the model's body (embedding, DecoderBlocks, final norm), as transformers runs it.
        head: LossHead over the output embedding.
        embedding: the input embedding module (part of `decoder`).
        is_tied: input and output embedding are one parameter.
        layouts: of the quantized bytes of each layer, were it quantized.
        kernels: what it computes with.
        tensors: name in the model's files -> (module, parameter name), quantized weights left out.
        mixtures: the experts of its layers.
        layers_prefix: where its layers are, by which adapters are named: "model.layers".
        context: the ranks that share the tokens of its rows, see World; or None.
    """

    decoder: PreTrainedModel
    head: LossHead
    kernels: KernelChoice

    def __init__(self, decoder: Any, head: LossHead, layouts: Sequence[Layout], kernels) -> None:
        super().__init__()
        self.decoder, self.head, self.layouts, self.kernels = decoder, head, layouts, kernels
        self.is_tied = head.weight is self.embedding.weight
        self.tensors: dict[str, tuple[nn.Module, str]] = {}
        self.layers_prefix = "model.layers"
        self.context: World | None = None
        self.mixtures = [m for m in decoder.modules() if isinstance(m, QuantizedExperts)]

    @property
    def embedding(self) -> nn.Module:
        """The input embedding module."""
        return self.decoder.get_input_embeddings()

    def set_checkpointing(self, cfg: TrainConfig, device: torch.device) -> None:
        """Choose what decoder layers keep for the backward pass; the rest is made again.

        Args:
            cfg: `levels` of the layers; reentrant_checkpointing; cuda_graphs;
                use_activation_cpu_offload.
            device: of the rank.
        """
        blocks = [module for module in self.modules() if isinstance(module, DecoderBlock)]
        bodies = [block.body for block in blocks]
        levels, is_reentrant = cfg.levels(len(bodies)), cfg.reentrant_checkpointing
        # A graph cannot follow tokens to their experts, has no inputs for the row lengths of DoRA,
        # and hands back gradients of `lora`, which must be alike in all layers.
        is_plain = all(body.slots and not body.slots[0].has_magnitude for body in bodies)
        is_plain &= len({tuple((s.name, s.scale, s.rank) for s in b.slots) for b in bodies}) == 1
        is_plain &= cfg.per_visit * cfg.passes * cfg.context_parallel == 1 and not self.mixtures
        setting = cfg.cuda_graphs if is_plain else "off"
        stores = [body.store for body in bodies if body.store and not self.mixtures]
        weights = max((store.layout.num_weights for store in stores), default=0)
        work = weights * cfg.batch_size * cfg.context_length
        graphs = choose_graphs(setting, [body.layer for body in bodies], device, work)
        for store in stores:
            store.cache.most_bytes = whole_layer_bytes(cfg.per_visit * cfg.passes)
        for body, level in zip(bodies, levels, strict=True):
            body.level, body.is_reentrant = level, is_reentrant
            body.graphs = None if is_reentrant else graphs
        width = self.decoder.config.hidden_size * getattr(torch, cfg.compute_dtype).itemsize
        offload = blocks[0].offload
        if offload is None and cfg.use_activation_cpu_offload:
            folder = cfg.resolved_output_dir if cfg.use_activation_cpu_offload == DISK else None
            tokens = cfg.batch_size * cfg.context_length // cfg.context_parallel
            offload = Offload(device, tokens * width, folder)
        for block, level in zip(blocks[:-1], levels, strict=False):  # the last is needed at once
            block.offload = None if level == "none" else offload

    @property
    def layers(self) -> nn.ModuleList:
        """The list of DecoderBlocks that transformers goes through."""
        lists = (m for m in self.decoder.modules() if isinstance(m, nn.ModuleList) and len(m))
        return next(layers for layers in lists if isinstance(layers[0], DecoderBlock))

    def can_visit(self, device: torch.device) -> bool:
        """Whether groups of rows can pass each layer together: see visit.take_apart.

        Args:
            device: of the rank.
        """
        size = self.decoder.config.hidden_size
        embeds = torch.zeros(1, 2, size, dtype=self.kernels.dtype, device=device)
        with visit.may_refuse():  # a decoder may want more than embeddings
            _, calls = visit.take_apart(self.decoder, self.layers, True, {"inputs_embeds": embeds})
            # See SharedStates.
            return not any(isinstance(v, UserDict) for call in calls for v in call.kwargs.values())
        return False

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """Context in which it computes the base, without gradient."""
        bodies = [block.body for block in cast(Any, self.layers)]
        for body in bodies:
            body.is_bare = True
        try:
            with torch.no_grad():
                yield
        finally:
            for body in bodies:
                body.is_bare = False

    def _visit(self, groups: Sequence[visit.RowGroup]) -> list[torch.Tensor]:
        ids = [group.input_ids for group in groups]
        embeds = self.embedding(torch.cat([part.flatten() for part in ids]).unsqueeze(0))
        parts = embeds.squeeze(0).split([part.numel() for part in ids])
        inputs: list[dict[str, Any]] = []
        for group, part in zip(groups, parts, strict=True):
            rest = group.rows.arguments(self.context) if group.rows is not None else {}
            inputs.append({"inputs_embeds": part.view(*group.input_ids.shape, -1), **rest})
        pairs = zip(groups, inputs, strict=True)
        decoder, layers = self.decoder, self.layers
        found = [visit.take_apart(decoder, layers, g.has_adapters, own) for g, own in pairs]
        hiddens, calls = [hidden for hidden, _ in found], [own for _, own in found]
        del found, embeds, parts
        for block, *of_layer in zip(layers, *calls, strict=True):
            hiddens = block(hiddens, of_layer)
        for i, group in enumerate(groups):
            with torch.set_grad_enabled(group.has_adapters and torch.is_grad_enabled()):
                hiddens[i] = visit.finish(decoder, layers, hiddens[i], inputs[i])
        return self.head(hiddens, [group.targets for group in groups])

    def forward(self, input_ids: Any, targets=None, cache=None, rows=None, **padding) -> Any:
        """Compute the loss of a batch, or the logits of its last token.

        Args:
            input_ids: int64 [B, T]. Padding stands on the right and is not a target: causal
                attention never sees it, so no mask is passed and the flash kernels stay usable.
                Or a list of RowGroups, which pass each layer together; nothing else then.
            targets: Targets that are trained; None for logits.
            cache: name of the argument -> a transformers Cache to generate with.
            rows: RowBounds, of rows that lie one after the other in the one sequence; or None.
            padding: attention_mask and position_ids of rows that are padded on the left.

        Returns:
            Loss sum over the targets, 0-d float32; or logits [B, 1, V], compute dtype; of a list
            of groups, a list.
        """
        if isinstance(input_ids, list):
            return self._visit(input_ids)
        rest = (rows.arguments(self.context) if rows is not None else padding) | (cache or {})
        out = self.decoder(input_ids=input_ids, use_cache=cache is not None, **rest)
        return self.head(out.last_hidden_state, targets)


def build(info: ModelInfo, cfg: TrainConfig, device: torch.device, extra="") -> QuantizedModel:
    """Build the model on the meta device and put quantized linears into its decoder layers.

    Args:
        info: what the model is.
        cfg: format_name, master_dtype, see `choose_kernels` and `trained_whole`_whole.
        device, extra: where it will compute; other words than ModelInfo.attention_extra has.

    Returns:
        The model in training mode, without adapters; all that is not trained itself is frozen.

    Raises:
        UserError: the linears of the built model are not those of `info` (code 5), or it computes
            otherwise than is known here (code 2).
    """
    config, extra = transformers_config(info), extra or info.attention_extra
    chosen = choose_kernels(cfg, device, extra)
    config.use_cache, attention = False, chosen.attention
    chosen = dataclasses.replace(chosen, note=chosen.note + _settle(config))
    if attention == "sdpa":
        attention = register(config, chosen.has_row_kernel and not extra)
    rule = f"model type {info.model_type} has attention classes of its own ({{}})"
    remedy = "use --context_parallel 1" if cfg.context_parallel > 1 else "use --attn eager"
    with one_line_of(f"--attn {chosen.attention}", remedy, rule=rule, kinds=KeyError):
        hf_model = on_meta(config, chosen.dtype, attention).requires_grad_(False)
    head, names = _loss_head(hf_model, info), stored_names(hf_model, info)
    inside = {at: name for name, at in names.items()}  # name in the files -> in the model
    known = (INDEXED.fullmatch(inside.get(at, "")) for at in info.linear_places())
    prefix = next((match["prefix"] for match in known if match), None)
    if prefix is None:
        got, rule = f"weights named {info.layers_prefix}.0", f"are no part of {info.model_type}"
        raise UserError(got, rule, "save the model with its head, as AutoModelForCausalLM")
    layers = cast(nn.ModuleList, hf_model.get_submodule(prefix))
    spares = attention == MASKED and chosen.has_row_kernel and _spare_masks(hf_model, layers)
    if chosen.attention == "sdpa" and not _is_known(hf_model, spares, info, cfg):
        return build(info, cfg, device, "sinks of another form")
    if chosen.use_liger:
        apply_liger(hf_model)
    layouts = layer_layouts(info, cfg.format_name)
    whole, master = trained_whole(info, cfg), getattr(torch, cfg.master_dtype)
    cache = LayerCache(chosen.matmul)
    params = [hf_model.get_parameter(inside.get(name, name)) for name in whole.root]
    for index, layer in enumerate(layers):
        is_whole = index in whole.layers
        block = DecoderBlock(None if is_whole else layouts[index], cache)
        stem, own = f"{info.layers_prefix}.{index}.", f"{prefix}.{index}."
        mine = [(at, name) for at, name in inside.items() if at.startswith(stem)]
        renamed = {at.removeprefix(stem): name.removeprefix(own) for at, name in mine}
        layers[index] = block
        block.body = _build_body(layer, info.by_layer[index], block.store, renamed)
        params += layer.parameters() if is_whole else ()
    for param in params:
        param.data = param.data.to(master)  # in place: a tied head is the same parameter
        param.requires_grad_(True)
    model = QuantizedModel(_decoder(hf_model)[1], head, layouts, chosen)
    model.tensors, model.layers_prefix = _places(hf_model, head, names), info.outer_name(prefix)
    return model.train()


def _settle(config: Any) -> str:
    """Switch off what a base draws in training: it would be another where a layer runs again.

    Returns:
        What was on, for the user.
    """
    # Phi-MoE's routers compute with the other.
    words = ("drop", "input_jitter" if hasattr(config, "input_jitter_noise") else "jitter")
    every = ((n, v) for n, v in vars(config).items() if any(word in n for word in words))
    found = {name: value for name, value in every if type(value) is float and value}
    for name in found:
        setattr(config, name, 0.0)
    return "".join(f", {name} {value} is off" for name, value in found.items())


def _is_known(hf_model: Any, spares: bool, info: ModelInfo, cfg: TrainConfig) -> bool:
    """Whether attention can stay as chosen; a refusal where the user has chosen it."""
    got, has_sdpa = f"attention of model type {info.model_type}", hf_model._supports_sdpa
    is_plain = has_sdpa and hf_model.config._attn_implementation == PLAIN
    if cfg.context_parallel > 1 and not spares and not is_plain:
        raise UserError(got, "is not known for cut rows", "use --context_parallel 1")
    if info.attention_extra != "indexed" and (has_sdpa or spares):
        return True
    if info.attention_extra == "sinks" and cfg.attn == "auto":
        return False
    raise UserError("--attn sdpa", f"computes otherwise than the {got}", "use --attn eager")


def _spare_masks(hf_model: Any, layers: nn.ModuleList) -> bool:
    """Build no masks where each layer asks for its window itself; say whether that is so."""
    config = _decoder(hf_model)[1].config
    decoder, layers = copy.deepcopy((_decoder(hf_model)[1], layers))  # rotary tables may change
    decoder.to("meta").config._attn_implementation = TRIAL
    embeds = torch.zeros(1, 2, config.hidden_size, dtype=hf_model.dtype, device="meta")
    inputs = {"inputs_embeds": embeds, "attention_mask": embeds[..., 0].bool()}
    with contextlib.suppress(Exception):  # of code that needs numbers, or that asks for more
        _, calls = visit.take_apart(decoder, layers, False, inputs)
        for layer, call in zip(layers, calls, strict=True):
            with contextlib.suppress(KnownAttention):
                layer(embeds, *call.args, **call.kwargs)
                return False
        config._attn_implementation = PLAIN
    return config._attn_implementation == PLAIN


def _places(hf_model: Any, head: LossHead, names: dict) -> dict[str, tuple[nn.Module, str]]:
    """Name in the files -> (module, name there) of what is not quantized."""
    parts = (*hf_model.named_parameters(), *hf_model.named_buffers())
    own_names = {name: name.replace(".body.layer.", ".") for name, _ in parts}
    places = {own: name.rpartition(".") for name, own in own_names.items() if own in names}
    found = {names[own]: (hf_model.get_submodule(at[0]), at[2]) for own, at in places.items()}
    own = {id(param): name for name, param in head.named_parameters()}
    own.pop(id(hf_model.get_input_embeddings().weight), None)  # tied: it stays the embedding's
    at_head = {name: own.get(id(getattr(*place))) for name, place in found.items()}
    return found | {name: (head, part) for name, part in at_head.items() if part}


def _decoder(hf_model: Any) -> tuple[str, Any]:
    """The decoder and its name; the prefix that Llama 4 gives is that of its wrapper."""
    prefix = hf_model.base_model_prefix
    name = prefix if hasattr(hf_model, prefix) else "model"
    return name, getattr(hf_model, name, hf_model)


def _loss_head(hf_model: Any, info: ModelInfo) -> LossHead:
    """The head that computes what the model's own does; tied to the embedding if it is."""
    output = hf_model.get_output_embeddings()
    softcap = getattr(hf_model.config, "final_logit_softcapping", None)
    scale = _measure_scale(hf_model, softcap)
    try:
        embedding = _decoder(hf_model)[1].get_input_embeddings().weight
    except (NotImplementedError, AttributeError):  # the decoder of something else
        embedding = None
    is_odd = info.is_tied and embedding is not None and embedding.shape != output.weight.shape
    if embedding is None or scale is None or is_odd:
        got = f"model type {info.model_type}"
        rule = (
            "has an embedding or a head of more than matrix, bias, scale, final_logit_softcapping"
        )
        raise UserError(got, rule, OTHER_MODEL)
    if info.is_tied:
        output.weight = embedding
    return LossHead(output.weight, output.bias, scale, softcap)


def on_meta(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """Build a model as transformers has it: no weights yet, but buffers such as rotary tables.

    Args:
        config: from `transformers_config`.
        dtype: of its parameters.
        attention: name of the implementation.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    got, rule = f"model type {config.model_type}", "transformers has no such causal language model"
    own: Any = {"dtype": dtype, "attn_implementation": attention}
    explained = one_line_of(got, OTHER_MODEL, rule=rule, kinds=ValueError)
    with explained, init_empty_weights(include_buffers=False), _LargeOnMeta():
        made = AutoModelForCausalLM.from_config(config, **own)
    for router in (m for m in made.modules() if hasattr(m, "router_jitter_noise")):
        router.eval().train = lambda *_: None  # Phi-MoE's, which draws the experts in training
    return made


class _LargeOnMeta(TorchFunctionMode):
    """What is made with zeros as large as only weights are takes no memory (experts of Llama 4)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        rest = kwargs or {}
        if func in (torch.zeros, torch.empty) and args and rest.get("device") is None:
            sizes = args if isinstance(args[0], int) else args[0]
            rest |= {"device": "meta"} if math.prod(sizes) > LARGE else {}
        return func(*args, **rest)


class _Output(MoEModelOutputWithPastAndCrossAttentions):
    """What a decoder returns, whatever else it is asked for."""

    def __getattr__(self, name: str) -> None:
        return None


def _measure_scale(hf_model: Any, softcap: float | None) -> float | None:
    """What transformers multiplies logits by, measured on a small head of random numbers.

    Returns:
        None: it does not compute cap(scale * (x W^T + b)).
    """
    own, (name, decoder) = hf_model.get_output_embeddings(), _decoder(hf_model)
    if type(own) is not nn.Linear or decoder is hf_model:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, own.in_features, generator=generator) / own.in_features**0.5
    head = nn.Linear(own.in_features, 16, own.bias is not None, device="cpu")
    for param in head.requires_grad_(False).parameters():
        param.normal_(generator=generator)
    hf_model.set_output_embeddings(head)
    answer = _Output(last_hidden_state=hidden)  # whatever the decoder is asked
    setattr(hf_model, name, visit.StandIn(decoder, lambda *_, **__: answer, is_for_all=True))
    try:
        with torch.no_grad():
            wanted = hf_model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits
    except Exception:  # it asks its decoder for more
        return None
    finally:
        hf_model.set_output_embeddings(own)
        setattr(hf_model, name, decoder)
    inner = wanted if softcap is None else (wanted / softcap).atanh() * softcap
    scale = float(f"{(inner / head(hidden)).median():.6g}")
    own_logits = LossHead(cast(Any, head).weight, head.bias, scale, softcap).logits(hidden)
    return scale if torch.allclose(own_logits, wanted, 1e-4, 1e-4) else None


def stored_names(hf_model: Any, info: ModelInfo) -> dict[str, str]:
    """Names in the files of what transformers loads into a model.

    Args:
        hf_model: as transformers has built it, on the meta device.
        info: what the model is.

    Returns:
        Name of a parameter or buffer -> name in the files, or, of experts held together, of none.

    Raises:
        UserError: of another one, or of several that are not those of experts (code 2).
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = hf_model.state_dict()
    written = {id(t): name for name, t in revert_weight_conversion(hf_model, dict(own)).items()}
    found = {name: written.get(id(tensor), name) for name, tensor in own.items()}
    tied = [name for name in hf_model.all_tied_weights_keys if name.startswith(info.layers_prefix)]
    alone = [n for n, t in own.items() if id(t) not in written and (t.dim() < 3 or t.shape[1] == 1)]
    rule = "is made by transformers of several tensors of the files, which is not done here"
    rule = "is a weight of another layer too, and each is trained by itself" if tied else rule
    if names := tied or alone:
        raise UserError(f"{names[0]} of a {info.model_type} model", rule, OTHER_MODEL)
    return {n: at if at in info.names else stored_name(info, n) for n, at in found.items()}


def shapes_of(config: dict) -> dict[str, list[int]]:
    """What the files of a model hold when transformers saves it.

    Args:
        config: content of config.json, of a causal language model.

    Returns:
        Name -> shape; a tied head is left out.
    """
    from transformers import AutoConfig
    from transformers.core_model_loading import revert_weight_conversion

    hf_config = AutoConfig.for_model(**_with_numbers(config))
    hf_model = on_meta(hf_config, torch.bfloat16, "eager")
    own = hf_model.state_dict()
    if hf_config.tie_word_embeddings:
        own.pop("lm_head.weight", None)
    return {n: list(t.shape) for n, t in revert_weight_conversion(hf_model, own).items()}


def transformers_config(info: ModelInfo) -> Any:
    """The config of a model as transformers has it.

    Args:
        info: the model.

    Raises:
        UserError: transformers does not know its type, or takes no such values (code 2).
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**_with_numbers(info.config))
    except Exception as error:  # of transformers, and of huggingface_hub's dataclasses
        words = printable(" ".join(str(error).split()))[:300]
        rule = f"transformers takes no such config.json ({words})"
        remedy = "take the model's own config.json, or a newer transformers"
        raise UserError(f"model type {info.model_type}", rule, remedy) from error


def _with_numbers(value: dict) -> dict:
    """Read {"__float__": "Infinity"}, which transformers writes where JSON has no number."""

    def number(table: dict) -> Any:
        return float(table["__float__"]) if table.keys() == {"__float__"} else table

    return json.loads(json.dumps(value), object_hook=number)


def _build_body(
    layer: nn.Module, kind: LayerKind, store: LayerStore | None, renamed: dict[str, str]
) -> TrainedLayer:
    """The layer over its store; `renamed`: name in the layer's files -> in the model."""
    built = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    places = {
        renamed.get(f"{n.name}.weight", n.name).removesuffix(".weight"): index
        for index, n in enumerate(kind.linears)
        if n.expert is None
    }
    expected = {name: kind.linears[index].shape for name, index in places.items()}
    # Other linears, such as routers, are tensors like all else.
    if {n: tuple(m.weight.shape) for n, m in built.items() if n in expected} != expected:
        got = f"linears {sorted(built)} in decoder layer {kind.layers[0]}"
        rule = f"its files and config.json say {sorted(expected)}"
        raise UserError(got, rule, "check that config.json belongs to these weights", INTEGRITY)
    if store is None:
        return TrainedLayer(layer, (), None)
    groups, linears = replace_experts(layer, kind.linears, store), {}
    for name, index in places.items():
        stored = kind.linears[index].name
        linears[name] = lora.QuantizedLinear(built[name], partial(store.weight, index), stored)
        linears[name].sums_in_fp16 = store.cache.sums_in_fp16
        layer.set_submodule(name, linears[name])
    joint = lora.group_linears(linears)
    for group in joint:
        indices = tuple(places[name] for name in linears if linears[name].group is group)
        if store.can_multiply(indices):
            group.linears[0].quantized = partial(store.quantized, indices)
    return TrainedLayer(layer, [*joint, *groups], store)
