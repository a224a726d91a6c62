"""Quantized experts of a mixture: each expert's three matrices are linears of the store.

transformers holds all experts of a layer in two 3-D parameters, which no 4-bit linear replaces;
files hold a matrix for each projection of each expert, and so do we.

Shape letters: M tokens, K experts a token goes to, H hidden size.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from fsdp_qlora.arch import Linear
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.model.lora import FrozenMatmul


class ExpertLinear(NamedTuple):
    """A frozen matrix of one expert, as FrozenMatmul wants it.

    Attributes:
        dequantize: dtype -> the frozen weight_OI, made anew.
        bias: none.
    """

    dequantize: Callable[[torch.dtype], torch.Tensor]
    bias: None = None


class QuantizedExperts(nn.Module):
    """The experts of a layer; nothing of their weights is saved for the backward pass.

    Attributes:
        experts: gate, up and down of each.
        act_fn: on the gate.
    """

    def __init__(self, experts: Sequence[Sequence[ExpertLinear]], act_fn: nn.Module) -> None:
        super().__init__()
        self.experts, self.act_fn = experts, act_fn

    def forward(
        self, hidden_MH: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Sum what the chosen experts make of each token.

        Args:
            hidden_MH: compute dtype.
            top_k_index, top_k_weights: [M, K], the experts of each token and their shares.

        Returns:
            [M, H].
        """
        out_MH = torch.zeros_like(hidden_MH)
        for number in top_k_index.unique().tolist():
            gate, up, down = self.experts[number]
            tokens, place = torch.where(top_k_index == number)
            gated, raised = FrozenMatmul.apply(hidden_MH[tokens], (gate, up), (), False, None, None)
            product = self.act_fn(gated) * raised
            (made,) = FrozenMatmul.apply(product, (down,), (), False, None)
            made = made * top_k_weights[tokens, place, None]
            out_MH = out_MH.index_add(0, tokens, made.to(out_MH.dtype))
        return out_MH


def replace(
    layer: nn.Module, linears: Sequence[Linear], weight: Callable[[int, torch.dtype], torch.Tensor]
) -> None:
    """Put quantized experts in the place of a decoder layer's own.

    Args:
        layer: as transformers has built it.
        linears: of the layer, in the order of its store.
        weight: (index of a linear, dtype) -> weight_OI.

    Raises:
        UserError: other experts than those of Mixtral and Qwen's mixtures, or other shapes than
            the files have (codes 2, 5).
    """
    found = [
        (name, module)
        for name, module in layer.named_modules()
        if any(param.dim() > 2 for param in module._parameters.values() if param is not None)
    ]
    parts = {part[1:]: i for i, linear in enumerate(linears) if (part := linear.expert)}
    if not found and not parts:
        return
    names = ", ".join(f"{name} ({type(module).__name__})" for name, module in found) or "no module"
    if len(found) != 1 or not _computes_as_mixtral(found[0][1]):
        rule = "are neither linears nor experts that compute as Mixtral's do"
        raise UserError(f"3-D weights of {names}", rule, "take another model: these stay in 16 bit")
    path, module = found[0]
    num, _, hidden = module.gate_up_proj.shape
    inner = module.down_proj.shape[2]
    wanted = [(inner, hidden), (inner, hidden), (hidden, inner)] * num
    order = [parts.get((i // 3, i % 3), -1) for i in range(3 * num)]
    shapes = [(linears[i].out_features, linears[i].in_features) for i in order if i >= 0]
    if len(parts) != 3 * num or shapes != wanted:
        rule = f"are {num} of {inner} features in config.json, not so in the files"
        raise UserError(f"experts of {names}", rule, "copy both from the same place", INTEGRITY)
    matrices = [ExpertLinear(partial(weight, index)) for index in order]
    experts = [matrices[start : start + 3] for start in range(0, len(matrices), 3)]
    parent, _, attribute = path.rpartition(".")
    setattr(layer.get_submodule(parent), attribute, QuantizedExperts(experts, module.act_fn))


def _computes_as_mixtral(module: nn.Module) -> bool:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    # Two, because Liger puts its own class in the place of the one whose model is built.
    kinds = (type(module), MixtralExperts, Qwen2MoeExperts)
    own, *known = [inspect.getsource(inspect.unwrap(kind.forward)) for kind in kinds]
    return own in known
