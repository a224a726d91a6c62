"""Cross entropy over trained tokens, without ever holding all logits.

Shape letters: B batch, T tokens, N trained tokens, H hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fsdp_qlora.planning.sizes import LOGITS_BYTES

IGNORE = -100  # label of a token that is not trained


class ChunkedCrossEntropy(torch.autograd.Function):
    """-log softmax(logits)[target] of N tokens, logits = cap(scale * (x W^T + b)), and their sum.

    Losses and gradients of x and, if it is trained, of W come from the same logits, a chunk of
    tokens at a time, so that nothing is computed twice and only [chunk, V] is ever held. Where each
    token has a weight that is known only later, rows of the gradient of x are multiplied by it in
    the backward, and that of W is made there from logits made anew.

    Args:
        x_NH: hidden states, compute dtype.
        weight_VH: output embedding, compute dtype; the gradient of a trained one is summed up in
            float32.
        targets_N: int64.
        rest: bias_V, scale, softcap of LossHead; whether the single losses are used, not the sum.

    Returns:
        The sum, 0-d float32, and the single ones, [N] float32.
    """

    @staticmethod
    def forward(ctx, x_NH, weight_VH, targets_N, *rest):
        ctx.set_materialize_grads(False)
        *of_logits, is_single = rest
        grad_NH = torch.empty_like(x_NH) if ctx.needs_input_grad[0] else None
        is_trained, grad_VH = ctx.needs_input_grad[1], None
        if is_trained and not is_single:  # summed in float32 over the chunks
            grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=x_NH.device)
        losses_N = loss.new_empty(x_NH.shape[0])
        for part in _chunks(x_NH, weight_VH):
            losses, grad = _loss_and_gradient(x_NH[part], weight_VH, targets_N[part], *of_logits)
            loss += losses.sum()
            losses_N[part] = losses.squeeze(1)
            if grad_NH is not None:
                torch.mm(grad, weight_VH, out=grad_NH[part])
            if grad_VH is not None:
                grad_VH += grad.t() @ x_NH[part]
            del grad  # before the next logits are made
        again = (x_NH, weight_VH, targets_N) if is_trained and is_single else ()
        ctx.save_for_backward(grad_NH, grad_VH, *again)
        ctx.of_logits, ctx.dtype = of_logits, weight_VH.dtype
        return loss, losses_N

    @staticmethod
    def backward(ctx, grad_loss, grad_losses_N):
        grad_NH, grad_VH, *again = ctx.saved_tensors
        factor = grad_loss if grad_losses_N is None else grad_losses_N.unsqueeze(1)
        if grad_NH is not None:
            grad_NH = grad_NH * factor.to(grad_NH.dtype)
        if grad_VH is not None:
            grad_VH = (grad_VH * grad_loss).to(ctx.dtype)
        elif again:
            x_NH, weight_VH, targets_N = again
            grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
            for part in _chunks(x_NH, weight_VH):
                rest = targets_N[part], *ctx.of_logits
                _, grad = _loss_and_gradient(x_NH[part], weight_VH, *rest)
                grad_VH += grad.mul_(factor[part].to(grad.dtype)).t() @ x_NH[part]
            grad_VH = grad_VH.to(ctx.dtype)
        return grad_NH, grad_VH, None, None, None, None, None


def _chunks(x_NH: Tensor, weight_VH: Tensor) -> Iterator[slice]:
    size = max(16, LOGITS_BYTES // (4 * weight_VH.shape[0]))
    return (slice(start, start + size) for start in range(0, x_NH.shape[0], size))


def _loss_and_gradient(x_NH, weight_VH, targets_N, bias_V, scale, softcap) -> tuple[Tensor, Tensor]:
    """Losses, [N, 1], and their gradients to the logits, 16 bit, with one float32 copy of them.

    Gradient of -log softmax(z)[t] to z: softmax(z) - onehot(t).
    """
    logits_NV, target_N1 = nn.functional.linear(x_NH, weight_VH, bias_V), targets_N.unsqueeze(1)
    dtype, logits_NV = logits_NV.dtype, logits_NV.float()
    squashed = None
    if scale != 1:
        logits_NV.mul_(scale)
    if softcap is not None:
        squashed = logits_NV.div_(softcap).tanh_()
        logits_NV = squashed * softcap
    most = logits_NV.amax(1, keepdim=True)
    at_target = logits_NV.gather(1, target_N1)
    powers = logits_NV.sub_(most).exp_()
    total = powers.sum(1, keepdim=True)
    losses = total.log() + most - at_target
    grad = powers.div_(total)
    grad.scatter_add_(1, target_N1, grad.new_full(target_N1.shape, -1.0))
    if squashed is not None:
        grad.mul_(squashed.square_().neg_().add_(1))
    if scale != 1:
        grad.mul_(scale)
    return losses, grad.to(dtype)


class Targets(NamedTuple):
    """What a batch is trained on.

    Attributes:
        positions_N: index into the B*T positions whose output is trained.
        tokens_N: the token that should follow each; None asks for the logits there.
        is_single: the loss of every token is asked for, not their sum.
    """

    positions_N: Tensor
    tokens_N: Tensor | None
    is_single: bool = False

    @classmethod
    def of(cls, labels_BT: Tensor, device: torch.device) -> "Targets":
        """Find the targets on the host, so that the device never waits.

        Args:
            labels_BT: int64 on the host, -100 = not trained, not shifted.
            device: where the targets go.
        """
        following = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE).flatten()
        positions_N = (following != IGNORE).nonzero().squeeze(1)
        tokens_N = following[positions_N].to(device, non_blocking=True)
        return cls(positions_N.to(device, non_blocking=True), tokens_N)


class LossHead(nn.Module):
    """The output embedding: the loss of a batch with targets, the last token's logits without.

    Attributes:
        weight: [V, H] (the input embedding's own parameter when tied).
        bias: [V], frozen (Phi-2), or None.
        scale: logits are multiplied by it (Cohere, Granite).
        softcap: then they become softcap * tanh(logits / softcap) (Gemma 2), or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, scale: float, softcap: float | None
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.scale, self.softcap = scale, softcap

    def forward(self, hidden_BTH: Any, targets: Any) -> Any:
        """Compute the loss, or logits.

        Args:
            hidden_BTH: output of the decoder, compute dtype; or a list, one of each group of rows.
            targets: Targets that are trained; None for the logits of the last token; or a list.

        Returns:
            Sum of the loss over the targets, 0-d float32, or of each, [N]; or logits [B, 1, V],
            or those of some positions [N, V], compute dtype; of a list, a list.
        """
        if isinstance(hidden_BTH, list):
            return [self.forward(*pair) for pair in zip(hidden_BTH, targets, strict=True)]
        x = hidden_BTH[:, -1:]
        if targets is not None:
            x = hidden_BTH.flatten(0, 1).index_select(0, targets.positions_N)
            if targets.tokens_N is not None:
                rest = self.bias, self.scale, self.softcap, targets.is_single
                found = ChunkedCrossEntropy.apply(x, self.weight, targets.tokens_N, *rest)
                return found[targets.is_single]
        return self.logits(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., H], compute dtype."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap
