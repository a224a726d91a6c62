"""The fused operations of adapted linears that read the same input.

Shape letters: M tokens of a batch, I in features, O out features, R LoRA ranks of all linears.
"""

import torch


class LoraProduct(torch.autograd.Function):
    """delta_MO = scale * (x A^T) B^T for every linear, and x itself passed through.

    It runs before the frozen products and is the only one of the two that saves a tensor (its
    input, and the few columns of x A^T), so that the recomputation of a checkpointed layer may
    stop before the last frozen product. Passing x through lets the backward add its share of the
    input gradient into that of the frozen products, without another tensor. The A matrices lie in
    one tensor: x is read once for all of them, forward and backward.

    Args:
        x: [..., I], compute dtype.
        lora_x: what the adapters see instead of x (after dropout), same shape; or None.
        a_RI: the A matrices one below the other, compute dtype.
        scale: see LoraSlot.scale.
        outputs: stand for the deltas without being made here (see Kept); or None.
        b_ORs: the B matrices, each with its own columns of R.

    Returns:
        x as a view, then delta_MO of each linear in the compute dtype.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    @staticmethod
    def forward(ctx, x, lora_x, a_RI, scale, outputs, *b_ORs):
        ctx.set_materialize_grads(False)
        seen = x if lora_x is None else lora_x
        hidden_MR = _flat(seen) @ a_RI.t()
        ctx.save_for_backward(seen, hidden_MR, a_RI, *b_ORs)
        ctx.scale, ctx.has_own_input = scale, lora_x is not None
        passed = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        if outputs is None:
            parts = hidden_MR.split([b_OR.shape[1] for b_OR in b_ORs], 1)
            outputs = [
                _scaled(part, b_OR.t(), scale) for part, b_OR in zip(parts, b_ORs, strict=True)
            ]
        return passed, *outputs

    @staticmethod
    def backward(ctx, grad_x, *grads_MO):
        seen, hidden_MR, a_RI, *b_ORs = ctx.saved_tensors
        parts = hidden_MR.split([b_OR.shape[1] for b_OR in b_ORs], 1)
        grad_parts, grad_bs = [], []
        for grad_MO, b_OR, part in zip(grads_MO, b_ORs, parts, strict=True):
            grad_parts.append(_scaled(grad_MO, b_OR, ctx.scale))
            grad_bs.append(_scaled(grad_MO.t(), part, ctx.scale))
        grad_hidden_MR = grad_parts[0] if len(grad_parts) == 1 else torch.cat(grad_parts, 1)
        grad_a = grad_hidden_MR.t() @ _flat(seen)
        grad_seen = None
        if ctx.has_own_input:
            if ctx.needs_input_grad[1]:
                grad_seen = (grad_hidden_MR @ a_RI).view_as(seen)
        elif grad_x is not None:
            _flat(grad_x).addmm_(grad_hidden_MR, a_RI)
        return grad_x, grad_seen, grad_a, None, None, *grad_bs


class FrozenProduct(torch.autograd.Function):
    """y_MO = delta_MO + x W^T + bias of every linear, W dequantised for the product only.

    Nothing is saved: the backward asks the store for each W again, and sums the input gradient in
    place over the linears.

    Args:
        x: [..., I], compute dtype.
        linears: the PackedLinears that hold W and bias.
        asides: for DoRA, of each linear an a_RI whose product with W is wanted too and whose bias
            is left out, or None; empty = none has one.
        is_done: the deltas are the outputs already (see Kept); nothing is made for `asides`.
        deltas_MO: added to in place; None where a linear has no adapter.

    Returns:
        y_MO of each linear in the compute dtype, then W A^T (no gradient passes it) or None of each
        of `asides`.
    """

    @staticmethod
    def forward(ctx, x, linears, asides, is_done, *deltas_MO):
        ctx.set_materialize_grads(False)
        ctx.linears, ctx.shape = linears, x.shape
        ctx.mark_dirty(*[delta for delta in deltas_MO if delta is not None])
        if is_done:
            return deltas_MO
        a_RIs = asides or [None] * len(linears)
        pairs = [
            _product(_flat(x), linear, delta, a_RI)
            for linear, delta, a_RI in zip(linears, deltas_MO, a_RIs, strict=True)
        ]
        sides = [side for _, side in pairs[: len(asides)]]
        ctx.mark_non_differentiable(*[side for side in sides if side is not None])
        return *[out for out, _ in pairs], *sides

    @staticmethod
    def backward(ctx, *grads_MO):
        grad_MI = None
        if ctx.needs_input_grad[0]:
            for grad_MO, linear in zip(grads_MO, ctx.linears, strict=False):
                weight_OI = linear.dequantize(grad_MO.dtype)
                if grad_MI is None:
                    grad_MI = grad_MO @ weight_OI
                else:
                    grad_MI.addmm_(grad_MO, weight_OI)
        grad_x = None if grad_MI is None else grad_MI.view(ctx.shape)
        deltas = zip(grads_MO, ctx.needs_input_grad[4:], strict=False)
        return grad_x, None, None, None, *[grad if needed else None for grad, needed in deltas]


def _product(
    x_MI: torch.Tensor, linear, delta_MO: torch.Tensor | None, a_RI: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight_OI = linear.dequantize(x_MI.dtype)
    out_MO = x_MI @ weight_OI.t() if delta_MO is None else delta_MO.addmm_(x_MI, weight_OI.t())
    if a_RI is not None:
        return out_MO, weight_OI @ a_RI.t()
    return out_MO if linear.bias is None else out_MO.add_(linear.bias), None


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * left @ right in one kernel (with beta 0 the first tensor is never read)."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scale)


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
