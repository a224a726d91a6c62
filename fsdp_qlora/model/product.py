"""The fused operation of an adapted linear: LoRA product and frozen product, each saving one input.

Shape letters: M tokens of a batch, I in features, O out features, R LoRA rank.
"""

import torch


class LoraProduct(torch.autograd.Function):
    """delta_MO = scale * (x A^T) B^T, and x itself passed through.

    It runs before the frozen product and is the only one of the two that saves a tensor (its
    input), so that the recomputation of a checkpointed layer may stop before the last frozen
    product. Passing x through lets the backward add its share of the input gradient into that of
    the frozen product, without another tensor.

    Args:
        x: [..., I], compute dtype.
        lora_x: what the adapter sees instead of x (after dropout), same shape; or None.
        a_RI, b_OR: the LoRA pair, compute dtype.
        scale: see LoraSlot.scale.

    Returns:
        (x as a view, delta_MO in the compute dtype).

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    @staticmethod
    def forward(ctx, x, lora_x, a_RI, b_OR, scale):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if lora_x is None else lora_x, a_RI, b_OR)
        ctx.scale, ctx.has_own_input = scale, lora_x is not None
        passed = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(passed)
        hidden_MR = _flat(x if lora_x is None else lora_x) @ a_RI.t()
        return passed, hidden_MR.mul_(scale) @ b_OR.t()

    @staticmethod
    def backward(ctx, grad_x, grad_MO):
        x, a_RI, b_OR = ctx.saved_tensors
        x_MI = _flat(x)
        hidden_MR = (x_MI @ a_RI.t()).mul_(ctx.scale)
        grad_hidden_MR = (grad_MO @ b_OR).mul_(ctx.scale)
        grad_a, grad_b = grad_hidden_MR.t() @ x_MI, grad_MO.t() @ hidden_MR
        if ctx.has_own_input:
            grad_lora_x = (grad_hidden_MR @ a_RI).view_as(x) if ctx.needs_input_grad[1] else None
            return grad_x, grad_lora_x, grad_a, grad_b, None
        if grad_x is not None:
            _flat(grad_x).addmm_(grad_hidden_MR, a_RI)
        return grad_x, None, grad_a, grad_b, None


class FrozenProduct(torch.autograd.Function):
    """y_MO = delta_MO + x W^T + bias, W dequantised for the product only, again in backward.

    Nothing is saved: the backward asks the store for W.

    Args:
        x: [..., I], compute dtype.
        delta_MO: added to in place; or None.
        linear: the PackedLinear that holds W and bias.

    Returns:
        y_MO in the compute dtype.
    """

    @staticmethod
    def forward(ctx, x, delta_MO, linear):
        ctx.linear, ctx.shape = linear, x.shape
        weight_OI = linear.dequantize(x.dtype)
        if delta_MO is None:
            out_MO = _flat(x) @ weight_OI.t()
        else:
            out_MO = delta_MO.addmm_(_flat(x), weight_OI.t())
            ctx.mark_dirty(delta_MO)
        return out_MO if linear.bias is None else out_MO.add_(linear.bias)

    @staticmethod
    def backward(ctx, grad_MO):
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_MO @ ctx.linear.dequantize(grad_MO.dtype)).view(ctx.shape)
        return grad_x, grad_MO if ctx.needs_input_grad[1] else None, None


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])
