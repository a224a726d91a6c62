"""The model without bytes: transformers builds it on the meta device, its layers become ours.

Kernels are chosen here: dtype, attention, and Liger's fused RMSNorm, RoPE, SwiGLU where they help.
"""

import importlib.util
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fsdp_qlora.arch import Linear, ModelInfo
from fsdp_qlora.arch.info import stored_name
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.errors import INTEGRITY, UserError, printable
from fsdp_qlora.model.attention import RowBounds, register
from fsdp_qlora.model.cuda_graphs import choose as choose_graphs
from fsdp_qlora.model.head import LossHead, Targets
from fsdp_qlora.model.layer import DecoderBlock, Offload, TrainedLayer
from fsdp_qlora.model.lora import ExpertLinear, QuantizedExperts, QuantizedLinear, group_linears
from fsdp_qlora.model.quantize import LayerCache, LayerStore, Layout, build_layout
from fsdp_qlora.planning.sizes import trained_whole

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


@dataclass(frozen=True)
class KernelChoice:
    """What a run computes with.

    Attributes:
        dtype: of matmuls and activations.
        attention: transformers' name of the implementation.
        has_row_kernel: flash attention over rows that lie one after the other runs on the device.
        use_liger: exchange RMSNorm, RoPE and SwiGLU for Liger's.
        note: one line for the user, with the reasons.
    """

    dtype: torch.dtype
    attention: str
    use_liger: bool
    has_row_kernel: bool
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
    attention, attention_why = cfg.attn, "as asked"
    if cfg.attn == "auto":
        is_installed = has_gpu and importlib.util.find_spec("flash_attn") is not None
        has_flash = is_installed and extra != "sinks"
        attention = "flash_attention_2" if has_flash else "eager" if extra else "sdpa"
        missing = "flash-attn not installed" if has_gpu else "no GPU"
        attention_why = "installed" if is_installed else missing
        attention_why += f", {extra}" * bool(extra)
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    use_liger = cfg.liger == "auto" and has_gpu and has_liger
    liger_why = "as asked" if cfg.liger == "off" else "not installed" if has_gpu else "no GPU"
    note = f"{cfg.compute_dtype}, attention {attention} ({attention_why}), Liger "
    note += "on" if use_liger else f"off ({liger_why})"
    has_rows = has_gpu and cfg.compute_dtype != "float32"
    has_rows = has_rows and torch.cuda.get_device_capability(device) >= (8, 0)
    return KernelChoice(getattr(torch, cfg.compute_dtype), attention, use_liger, has_rows, note)


def apply_liger(hf_model: "PreTrainedModel") -> None:
    """Let Liger's own API exchange the kernels of a transformers model.

    The loss stays ours: its head is sharded in a group of its own. Which of RMSNorm, RoPE, SwiGLU
    or GeGLU are exchanged is Liger's choice for the type.

    Args:
        hf_model: changed in place; left alone where Liger does not know its type.
    """
    # Liger warns of every backend that it cannot import.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    own = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    _apply_liger_kernel_to_instance(model=hf_model, **own)


class QuantizedModel(nn.Module):
    """A causal language model over quantized layers.

    Attributes:
        decoder: the model's body (embedding, DecoderBlocks, final norm), as transformers runs it.
        head: LossHead over the output embedding.
        embedding: the input embedding module (part of `decoder`).
        is_tied: input and output embedding are one parameter.
        layout: of the quantized bytes of a layer.
        kernels: what it computes with.
        tensors: name in the model's files -> (module, parameter name), quantized weights left out.
    """

    decoder: "PreTrainedModel"
    head: LossHead

    def __init__(
        self, decoder: "PreTrainedModel", head: LossHead, layout: Layout, kernels: KernelChoice
    ) -> None:
        super().__init__()
        self.decoder, self.head, self.layout, self.kernels = decoder, head, layout, kernels
        self.is_tied = head.weight is self.embedding.weight
        self.tensors: dict[str, tuple[nn.Module, str]] = {}

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
        has_experts = any(isinstance(module, QuantizedExperts) for module in self.modules())
        setting = cfg.cuda_graphs if is_plain and not has_experts else "off"
        weights = max((body.store.layout.num_weights for body in bodies if body.store), default=0)
        work = weights * cfg.batch_size * cfg.context_length
        graphs = choose_graphs(setting, [body.layer for body in bodies], device, work)
        for body, level in zip(bodies, levels, strict=True):
            body.level, body.is_reentrant = level, is_reentrant
            body.graphs = None if is_reentrant else graphs
        width = self.decoder.config.hidden_size * getattr(torch, cfg.compute_dtype).itemsize
        offload = blocks[0].offload
        if offload is None and cfg.use_activation_cpu_offload:
            offload = Offload(device, cfg.batch_size * cfg.context_length * width)
        for block, level in zip(blocks[:-1], levels, strict=False):  # the last is needed at once
            block.offload = None if level == "none" else offload

    def forward(
        self,
        input_ids: torch.Tensor,
        targets: Targets | None = None,
        past_key_values: "Cache | None" = None,
        rows: RowBounds | None = None,
    ) -> torch.Tensor:
        """Compute the loss of a batch, or the logits of its last token.

        Args:
            input_ids: int64 [B, T]. Padding stands on the right and is not a target: causal
                attention never sees it, so no mask is passed and the flash kernels stay usable.
            targets: what is trained; None for logits.
            past_key_values: a transformers Cache to generate with.
            rows: several rows lie one after the other in the one sequence; or None.

        Returns:
            Loss sum over the targets, 0-d float32; or logits [B, 1, V], compute dtype.
        """
        out = self.decoder(
            input_ids=input_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            **(rows.arguments() if rows is not None else {}),
        )
        return self.head(out.last_hidden_state, targets)


def build(info: ModelInfo, cfg: TrainConfig, device: torch.device) -> QuantizedModel:
    """Build the model on the meta device and put quantized linears into its decoder layers.

    Args:
        info: what the model is.
        cfg: format_name, master_dtype, see `choose_kernels` and `trained_whole`_whole.
        device: where it will compute.

    Returns:
        The model in training mode, without adapters; all that is not trained itself is frozen.

    Raises:
        UserError: the linears of the built model are not those of `info` (code 5), or it computes
            otherwise than is known here (code 2).
    """
    config, chosen = transformers_config(info), choose_kernels(cfg, device, info.attention_extra)
    config.use_cache, attention = False, chosen.attention
    if attention == "sdpa":
        attention = register(config, chosen.has_row_kernel)
    try:
        hf_model = on_meta(config, chosen.dtype, attention).requires_grad_(False)
    except KeyError as error:
        rule = f"model type {info.model_type} has attention classes of its own ({error})"
        raise UserError(f"--attn {chosen.attention}", rule, "use --attn eager") from None
    head = _loss_head(hf_model, info)
    if chosen.attention == "sdpa" and not hf_model._supports_sdpa:
        rule = f"computes otherwise than the attention of model type {info.model_type}"
        raise UserError("--attn sdpa", rule, "use --attn eager")
    if info.layers_prefix not in dict(hf_model.named_modules()):
        got, rule = f"weights named {info.layers_prefix}.0", f"are no part of {info.model_type}"
        raise UserError(got, rule, "save the model with its head, as AutoModelForCausalLM")
    names = stored_names(hf_model, info)
    if chosen.use_liger:
        apply_liger(hf_model)
    layout = build_layout([linear.shape for linear in info.linears], cfg.format_name)
    whole, master = trained_whole(info, cfg), getattr(torch, cfg.master_dtype)
    layers, cache = cast(nn.ModuleList, hf_model.get_submodule(info.layers_prefix)), LayerCache()
    params = [hf_model.get_parameter(name) for name in whole.root]
    for index, layer in enumerate(layers):
        is_whole = index in whole.layers
        block = DecoderBlock(None if is_whole else layout, cache)
        layers[index], block.body = block, _build_body(layer, info, block.store)
        params += layer.parameters() if is_whole else ()
    for param in params:
        param.data = param.data.to(master)  # in place: a tied head is the same parameter
        param.requires_grad_(True)
    model = QuantizedModel(hf_model.base_model, head, layout, chosen)
    model.tensors = _places(hf_model, head, names)
    return model.train()


def _places(
    hf_model: Any, head: LossHead, names: dict[str, str]
) -> dict[str, tuple[nn.Module, str]]:
    """Name in the files -> (module, name there) of what is not quantized."""
    parts = {**dict(hf_model.named_parameters()), **dict(hf_model.named_buffers())}
    own_names = {name: name.replace(".body.layer.", ".") for name in parts}
    found = {names[own]: _owner(hf_model, name) for name, own in own_names.items() if own in names}
    own = {id(param): name for name, param in head.named_parameters()}
    own.pop(id(hf_model.get_input_embeddings().weight), None)  # tied: it stays the embedding's
    at_head = {name: own.get(id(getattr(*place))) for name, place in found.items()}
    return found | {name: (head, part) for name, part in at_head.items() if part}


def _loss_head(hf_model: Any, info: ModelInfo) -> LossHead:
    """The head that computes what the model's own does; tied to the embedding if it is."""
    output = hf_model.get_output_embeddings()
    softcap = getattr(hf_model.config, "final_logit_softcapping", None)
    scale = _measure_scale(hf_model, softcap)
    try:
        embedding = hf_model.base_model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):  # the decoder of something else
        embedding = None
    is_odd = info.is_tied and embedding is not None and embedding.shape != output.weight.shape
    if embedding is None or scale is None or is_odd:
        got = f"model type {info.model_type}"
        rule = "has more than an embedding and a head that is a matrix with a bias, a scale, a cap"
        raise UserError(got, rule, "take another model")
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
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


class _StandIn(nn.Module):
    """In the place of a decoder: whatever it is asked, these hidden states are its answer."""

    def __init__(self, decoder: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self.own, self.hidden = (decoder,), hidden  # a tuple: no child

    def forward(self, *args, **kwargs):
        from transformers.modeling_outputs import MoEModelOutputWithPastAndCrossAttentions

        return MoEModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self.own[0], name)
            return self if isinstance(found, nn.Module) else found


def _measure_scale(hf_model: Any, softcap: float | None) -> float | None:
    """What transformers multiplies logits by, measured on a small head of random numbers.

    Returns:
        None: it does not compute cap(scale * (x W^T + b)).
    """
    own, decoder = hf_model.get_output_embeddings(), hf_model.base_model
    if type(own) is not nn.Linear or decoder is hf_model:
        return None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 4, own.in_features, generator=generator) / own.in_features**0.5
    head = nn.Linear(own.in_features, 16, own.bias is not None, device="cpu")
    for param in head.requires_grad_(False).parameters():
        param.normal_(generator=generator)
    hf_model.set_output_embeddings(head)
    setattr(hf_model, hf_model.base_model_prefix, _StandIn(decoder, hidden))
    try:
        with torch.no_grad():
            wanted = hf_model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits
    except Exception:  # it asks its decoder for more
        return None
    finally:
        hf_model.set_output_embeddings(own)
        setattr(hf_model, hf_model.base_model_prefix, decoder)
    inner = wanted if softcap is None else (wanted / softcap).atanh() * softcap
    scale = float(f"{(inner / head(hidden)).median():.6g}")
    weight, bias = head.get_parameter("weight"), head._parameters["bias"]
    own_logits = LossHead(weight, bias, scale, softcap).logits(hidden)
    return scale if torch.allclose(own_logits, wanted, 1e-4, 1e-4) else None


def stored_names(hf_model: Any, info: ModelInfo) -> dict[str, str]:
    """Names in the files of what transformers loads into a model.

    Args:
        hf_model: as transformers has built it, on the meta device.
        info: what the model is.

    Returns:
        Name of a parameter or buffer -> name in the files, or, of experts held together, of none.
    """
    from transformers.core_model_loading import revert_weight_conversion

    own = hf_model.state_dict()
    written = {id(t): name for name, t in revert_weight_conversion(hf_model, dict(own)).items()}
    found = {name: written.get(id(tensor), name) for name, tensor in own.items()}
    return {n: at if at in info.tensors else stored_name(info, n) for n, at in found.items()}


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


def _with_numbers(value: Any) -> Any:
    """Read {"__float__": "Infinity"}, which transformers writes where JSON has no number."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    if isinstance(value, dict):
        return {key: _with_numbers(entry) for key, entry in value.items()}
    return [_with_numbers(entry) for entry in value] if isinstance(value, list) else value


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _build_body(layer: nn.Module, info: ModelInfo, store: LayerStore | None) -> TrainedLayer:
    built = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    places = {n.name: index for index, n in enumerate(info.linears) if n.expert is None}
    expected = {name: info.linears[index].shape for name, index in places.items()}
    # Other linears, such as routers, are tensors like all else.
    if {n: tuple(m.weight.shape) for n, m in built.items() if n in expected} != expected:
        got = f"linears {sorted(built)} in the {info.model_type} decoder layer"
        rule = f"its files and config.json say {sorted(expected)}"
        raise UserError(got, rule, "check that config.json belongs to these weights", INTEGRITY)
    if store is None:
        return TrainedLayer(layer, (), None)
    _replace_experts(layer, info.linears, store)
    linears = {}
    for name, index in places.items():
        linears[name] = QuantizedLinear(built[name], partial(store.weight, index))
        layer.set_submodule(name, linears[name])
    return TrainedLayer(layer, group_linears(linears), store)


def _replace_experts(layer: nn.Module, linears: Sequence[Linear], store: LayerStore) -> None:
    """Put quantized experts in the place of a decoder layer's own.

    Args:
        layer: as transformers has built it.
        linears: of the layer, in the order of its store.
        store: of the layer.

    Raises:
        UserError: other experts than those of Mixtral and Qwen's mixtures, or other shapes than
            the files have (codes 2, 5).
    """
    paths = sorted({n.rpartition(".")[0] for n, p in layer.named_parameters() if p.dim() > 2})
    found: dict[str, Any] = {path: layer.get_submodule(path) for path in paths}
    parts = {part[1:]: i for i, linear in enumerate(linears) if (part := linear.expert)}
    if not found and not parts:
        return
    names = ", ".join(f"{path} ({type(module).__name__})" for path, module in found.items())
    names = names or "no module"
    if len(found) != 1 or not _computes_as_mixtral(*found.values()):
        rule = "are neither linears nor experts that compute as Mixtral's do"
        raise UserError(f"3-D weights of {names}", rule, "take another model: these stay in 16 bit")
    ((path, module),) = found.items()
    num, _, hidden = module.gate_up_proj.shape
    inner = module.down_proj.shape[2]
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    wanted = {(n, k): shape for n in range(num) for k, shape in enumerate(shapes)}
    if {part: linears[index].shape for part, index in parts.items()} != wanted:
        rule = f"are {num} of {inner} features in config.json, not so in the files"
        raise UserError(f"experts of {names}", rule, "copy both from the same place", INTEGRITY)
    matrices = {part: ExpertLinear(partial(store.weight, index)) for part, index in parts.items()}
    experts = [[matrices[n, k] for k in range(3)] for n in range(num)]
    layer.set_submodule(path, QuantizedExperts(experts, module.act_fn))


def _computes_as_mixtral(module: nn.Module) -> bool:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    # Two, because Liger puts its own class in the place of the one whose model is built.
    kinds = (type(module), MixtralExperts, Qwen2MoeExperts)
    own, *known = [inspect.getsource(inspect.unwrap(kind.forward)) for kind in kinds]
    return own in known
