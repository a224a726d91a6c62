"""Causal attention whose output a recomputed layer can keep (level "selective").

Shape letters: B batch, N heads, T tokens, D head size.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PLAIN = "fsdp_qlora_causal"  # names by which transformers finds `attend`, without masks
MASKED = "fsdp_qlora_masked"  # and with masks, for sliding windows
WINDOWS = ("sliding_window", "attention_chunk_size")  # keys of a config
FLASH_HEAD_SIZES = range(8, 257, 8)


def register(config) -> str:
    """Tell transformers of `attend`; twice is harmless.

    A model whose layers all attend to everything before a token needs no mask: none is then built,
    which spares transformers a look at the position ids for which the host waits.

    Args:
        config: of the model.

    Returns:
        The name to build it with.
    """
    for name in (PLAIN, MASKED):
        AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(MASKED, sdpa_mask)
    kinds = set(getattr(config, "layer_types", None) or ())
    has_window = any(getattr(config, name, None) for name in WINDOWS) and not kinds
    return MASKED if has_window or kinds - {"full_attention"} else PLAIN


def attend(module, query, key, value, attention_mask, **kwargs):
    """Attention as transformers calls it: its own SDPA, unless the layer keeps the result.

    Args:
        module: attention module; its `kept` (see linear.Kept) is set while a layer runs that keeps.
        query: [B, N, T, D].
        key, value: [B, N or fewer, T, D].
        attention_mask: None = causal.
        kwargs: as transformers has them (dropout, scaling, is_causal, ...).

    Returns:
        ([B, T, N, D], None).
    """
    kept = getattr(module, "kept", None)
    is_plain = attention_mask is None and not kwargs.get("dropout")
    is_plain = is_plain and query.shape[2] == key.shape[2] and query.shape[2] > 1
    if kept is None or not is_plain or not _has_flash(query, value):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.device.type == "cpu":  # its kernel wants as many key heads as query heads
        num_groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(num_groups, 1) for t in (key, value))
    done = kept.take() if kept.is_replay else None
    out, *rest = KeptAttention.apply(query, key, value, kwargs.get("scaling"), done)
    if done is None:
        kept.store(out.detach(), *rest)
    return out.transpose(1, 2).contiguous(), None


def _has_flash(query: torch.Tensor, value: torch.Tensor) -> bool:
    if query.shape[-1] != value.shape[-1] or query.shape[-1] not in FLASH_HEAD_SIZES:
        return False
    if query.device.type == "cpu":
        return True
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    return is_16_bit and torch.cuda.get_device_capability(query.device) >= (8, 0)


class KeptAttention(torch.autograd.Function):
    """PyTorch's own flash attention, forward and backward, or only the latter of a kept result.

    Args:
        query, key, value: [B, N, T, D].
        scale: of the scores; None = D ** -0.5.
        done: what a former call returned, taken over without computing; or None.

    Returns:
        out_BNTD, log-sum-exp of the scores, and what else the backward kernel asks for.
    """

    @staticmethod
    def forward(ctx, query, key, value, scale, done):
        ctx.set_materialize_grads(False)
        results = done or _flash(query, key, value, scale)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(query, key, value, *results)
        ctx.scale = scale
        return results

    @staticmethod
    def backward(ctx, grad_out, *_):
        return *_flash_backward(grad_out, ctx.saved_tensors, ctx.scale), None, None


def _flash(query, key, value, scale) -> tuple[torch.Tensor, ...]:
    aten = torch.ops.aten
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
    out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
    return out[0], out[1], out[6], out[7]  # the two last: state of dropout, which there is none of


def _flash_backward(grad_out, saved, scale) -> tuple[torch.Tensor, ...]:
    aten, (query, key, value, out, log_sum, *rest) = torch.ops.aten, saved
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, query, key, value, out, log_sum, 0.0, True, scale=scale
        )
    lengths = None, None, query.shape[2], key.shape[2]  # None: no row is made of several
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, query, key, value, out, log_sum, *lengths, 0.0, True, *rest, scale=scale
    )
