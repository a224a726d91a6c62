"""DoRA: a weight's direction learnt by a LoRA pair, the length of its rows by a vector.

y = (m / n) * (W + s B A) x with n the lengths of the rows of W + s B A, which gradients do not
pass. What is trained is d = m - ||W||, zero at the start: in 16 bit m itself would be off by 0.4 %
before the first step, and products would be scaled by it.

Shape letters: M tokens of a batch, I in features, O out features, R LoRA rank.

Source: DoRA, arXiv 2402.09353, equation 5 and section 4.3; with dropout, peft's DoraLinearVariant.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fsdp_qlora.model.product import FrozenProduct, LoraProduct
from fsdp_qlora.model.recompute import Kept

if TYPE_CHECKING:
    from fsdp_qlora.model.linear import Adapter, PackedLinear

ROWS = 1024  # of a weight in float32 at once


class Rescaled(torch.autograd.Function):
    """y_MO = (1 + gain_O) * z_MO + bias_O.

    Args:
        z_MO: compute dtype.
        gain_O: float32; added to one only in the product, where it is not rounded away.
        bias_O: frozen, or None.

    Returns:
        y_MO, compute dtype.
    """

    @staticmethod
    def forward(ctx, z_MO, gain_O, bias_O):
        gain_O = gain_O.to(z_MO.dtype)
        ctx.save_for_backward(z_MO, gain_O)
        out_MO = torch.addcmul(z_MO, z_MO, gain_O)
        return out_MO if bias_O is None else out_MO.add_(bias_O)

    @staticmethod
    def backward(ctx, grad_MO):
        z_MO, gain_O = ctx.saved_tensors
        grad_gain_O = (grad_MO * z_MO).sum(0, dtype=torch.float32)
        return torch.addcmul(grad_MO, grad_MO, gain_O), grad_gain_O, None


def row_squares(weight_OI: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of every row, float32 [O]; only ROWS rows are ever held in float32."""
    return torch.cat([part.float().square().sum(1) for part in weight_OI.split(ROWS)])


@torch.no_grad()
def row_norms(
    squares_O: torch.Tensor,
    weight_a_OR: torch.Tensor,
    a_RI: torch.Tensor,
    b_OR: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Lengths of the rows of W + s B A, without that matrix.

    ||w + s b A||^2 = ||w||^2 + 2 s (A w) . b + s^2 b (A A^T) b^T for a row w of W and b of B.

    Args:
        squares_O: of the rows of W, float32.
        weight_a_OR: W A^T.
        a_RI, b_OR, scale: the LoRA pair.

    Returns:
        float32 [O].
    """
    a_RI, b_OR = a_RI.float(), b_OR.float()
    gram_RR = a_RI @ a_RI.t()
    crossed_OR = (2 * scale * weight_a_OR.float()).addmm_(b_OR, gram_RR, alpha=scale * scale)
    return (squares_O + crossed_OR.mul_(b_OR).sum(1)).clamp_min_(1e-30).sqrt_()


def outputs(
    x: torch.Tensor, linears: Sequence["PackedLinear"], adapter: "Adapter", kept: Kept | None
) -> list[torch.Tensor]:
    """y_MO of linears that read the same input, some of them with an adapter.

    Args:
        x: [..., I].
        linears: in the order of the store.
        adapter: with magnitudes.
        kept: where products and lengths are stored or taken from, or None.
    """
    if adapter.dropout and linears[0].training:
        return _dropped_outputs(x, linears, adapter)
    own = adapter.linears
    done = kept.take() if kept is not None and kept.is_replay else None
    a_RIs = dict(zip(own, adapter.a_RI.split([b.shape[1] for b in adapter.b_ORs]), strict=True))
    deltas: dict[PackedLinear, torch.Tensor | None] = dict.fromkeys(linears)
    deltas |= zip(linears, done or (), strict=False)
    given = None if done is None else [deltas[linear] for linear in own]
    x, *made = LoraProduct.apply(x, None, adapter.a_RI, adapter.scale, given, *adapter.b_ORs)
    deltas |= zip(own, made, strict=True)
    asides = [a_RIs.get(linear) for linear in linears]
    products = FrozenProduct.apply(x, linears, asides, done is not None, *deltas.values())
    made_of = dict(zip(linears, products, strict=False))
    if done is not None:
        norms_O = list(done[len(linears) :])
    else:
        sides = [side for side in products[len(linears) :] if side is not None]
        rest = zip(adapter.squares_O, sides, a_RIs.values(), adapter.b_ORs, strict=True)
        norms_O = [row_norms(*parts, adapter.scale) for parts in rest]
    if kept is not None and done is None:
        # What has no adapter is handed out as it is, and Liger's rotary kernel writes into it.
        safe = [z.detach() if n in a_RIs else z.detach().clone() for n, z in made_of.items()]
        kept.store(*safe, *norms_O)
    for linear, *parts in zip(own, adapter.changes_O, adapter.squares_O, norms_O, strict=True):
        made_of[linear] = _rescaled(made_of[linear], linear.bias, *parts)
    return list(made_of.values())


def _dropped_outputs(
    x: torch.Tensor, linears: Sequence["PackedLinear"], adapter: "Adapter"
) -> list[torch.Tensor]:
    """As peft: the base sees x, what DoRA changes in it sees x after dropout; two products."""
    a_RIs = adapter.a_RI.split([b.shape[1] for b in adapter.b_ORs])
    own = dict(zip(adapter.linears, range(len(a_RIs)), strict=True))
    outs = []
    for linear in linears:
        if linear not in own:
            outs += FrozenProduct.apply(x, (linear,), (), False, None)
            continue
        i = own[linear]
        a_RI, b_OR, scale = a_RIs[i], adapter.b_ORs[i], adapter.scale
        dropped = nn.functional.dropout(x, adapter.dropout)
        (rest,) = FrozenProduct.apply(x - dropped, (linear,), (), False, None)
        dropped, delta = LoraProduct.apply(dropped, None, a_RI, scale, None, b_OR)
        product, aside = FrozenProduct.apply(dropped, (linear,), (a_RI,), False, delta)
        square_O, change_O = adapter.squares_O[i], adapter.changes_O[i]
        norm_O = row_norms(square_O, aside, a_RI, b_OR, scale)
        outs.append(rest + _rescaled(product, None, change_O, square_O, norm_O))
    return outs


def _rescaled(
    z_MO: torch.Tensor,
    bias_O: torch.Tensor | None,
    change_O: torch.Tensor,
    square_O: torch.Tensor,
    norm_O: torch.Tensor,
) -> torch.Tensor:
    gain_O = (square_O.sqrt() - norm_O + change_O.float()) / norm_O
    return Rescaled.apply(z_MO, gain_O, bias_O)
