"""Cross entropy over trained tokens, without ever holding all logits.

Shape letters: B batch, T tokens, N trained tokens, H hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import nn

CHUNK_BYTES = 256 * 2**20  # float32 logits held at once
IGNORE = -100  # label of a token that is not trained


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over N tokens of -log softmax(x W^T)[target], W frozen.

    Loss and gradient of x come from the same logits, a chunk of tokens at a time, so that nothing
    is computed twice and only [chunk, V] is ever held.

    Args:
        x_NH: hidden states, compute dtype.
        weight_VH: output embedding, compute dtype.
        targets_N: int64.
        softcap: see LossHead, or None.

    Returns:
        The sum, 0-d float32.
    """

    @staticmethod
    def forward(ctx, x_NH, weight_VH, targets_N, softcap):
        chunk = max(16, CHUNK_BYTES // (4 * weight_VH.shape[0]))
        grad_NH = torch.empty_like(x_NH) if ctx.needs_input_grad[0] else None
        loss = torch.zeros((), dtype=torch.float32, device=x_NH.device)
        for start in range(0, x_NH.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (x_NH[part] @ weight_VH.t()).float()
            if softcap is not None:
                squashed = logits.div_(softcap).tanh_()
                logits = squashed * softcap
            log_norm = logits.logsumexp(1, keepdim=True)
            target = targets_N[part].unsqueeze(1)
            loss += (log_norm - logits.gather(1, target)).sum()
            if grad_NH is not None:
                grad = logits.sub_(log_norm).exp_()
                grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
                if softcap is not None:
                    grad.mul_(1 - squashed.square())
                torch.mm(grad.to(x_NH.dtype), weight_VH, out=grad_NH[part])
        ctx.save_for_backward(grad_NH)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_loss.to(grad_NH.dtype), None, None, None


class Targets(NamedTuple):
    """What a batch is trained on.

    Attributes:
        positions_N: index into the B*T positions whose output is trained.
        tokens_N: the token that should follow each.
    """

    positions_N: torch.Tensor
    tokens_N: torch.Tensor

    @classmethod
    def of(cls, labels_BT: torch.Tensor, device: torch.device) -> "Targets":
        """Find the targets on the host, so that the device never waits.

        Args:
            labels_BT: int64 on the host, -100 = not trained, not shifted.
            device: where the targets go.
        """
        following = torch.full_like(labels_BT, IGNORE)
        following[:, :-1] = labels_BT[:, 1:]
        positions_N = (following.flatten() != IGNORE).nonzero().squeeze(1)
        tokens_N = following.flatten()[positions_N]
        return cls(
            positions_N.to(device, non_blocking=True), tokens_N.to(device, non_blocking=True)
        )


class LossHead(nn.Module):
    """The output embedding: the loss of a batch with targets, the last token's logits without.

    Attributes:
        weight: [V, H], frozen (the input embedding's own parameter when tied).
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2), or None.
    """

    def __init__(self, weight: nn.Parameter, config) -> None:
        super().__init__()
        self.weight = weight
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden_BTH: torch.Tensor, targets: Targets | None) -> torch.Tensor:
        """Compute the loss, or the logits of the last token.

        Args:
            hidden_BTH: output of the decoder, compute dtype.
            targets: what is trained; None for logits.

        Returns:
            Sum of the loss over the targets, 0-d float32; or logits [B, 1, V], compute dtype.
        """
        if targets is None:
            logits = hidden_BTH[:, -1:] @ self.weight.t()
            return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap
        x_NH = hidden_BTH.flatten(0, 1).index_select(0, targets.positions_N)
        return ChunkedCrossEntropy.apply(x_NH, self.weight, targets.tokens_N, self.softcap)
