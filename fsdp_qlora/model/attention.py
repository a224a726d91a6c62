"""Causal attention whose output a recomputed layer can keep (level "selective").

Shape letters: B batch, N heads, T tokens, D head size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fsdp_qlora.errors import UserError
from fsdp_qlora.planning.sizes import LONG_TOKENS, head_parts


class RowBounds(NamedTuple):
    """Where the rows of a sequence of T tokens begin and end.

    Attributes:
        bounds: int32 [rows + 1], first token of each row, and T.
        position_ids: int64 [1, T], counted from 0 in each row.
        longest: tokens of the longest row.
    """

    bounds: torch.Tensor
    position_ids: torch.Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "RowBounds | None":
        """Find the bounds on the host, so that the device never waits.

        Args:
            lengths: tokens of each row; empty when a sequence is one row.
            device: where they go.
        """
        if not lengths:
            return None
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
        if device.type == "cuda":
            bounds = bounds.pin_memory().to(device, non_blocking=True)
            position_ids = position_ids.pin_memory().to(device, non_blocking=True)
        return cls(bounds, position_ids, max(lengths))

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a transformers decoder; those of its flash attention, too."""
        bounds = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), self.bounds)
        lengths = dict.fromkeys(("max_length_q", "max_length_k"), self.longest)
        return {"position_ids": self.position_ids, **bounds, **lengths}


aten = torch.ops.aten
PLAIN = "fsdp_qlora_causal"  # names by which transformers finds `attend`, without masks
MASKED = "fsdp_qlora_masked"  # and with masks, for sliding windows
WINDOWS = ("sliding_window", "attention_chunk_size")  # keys of a config
HEAD_SIZES = range(8, 257, 8)
# Keywords of which `attend` knows what they ask for; masks hold what the rest of them says.
KEYWORDS = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache"}
KEYWORDS |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions"}
KEYWORDS |= {"output_router_logits", "logits_to_keep"}


def register(config, has_row_kernel: bool) -> str:
    """Tell transformers of `attend`; twice is harmless.

    A model whose layers all attend to everything before a token needs no mask where there is a
    kernel for rows: none is then built, which spares transformers a look at the position ids for
    which the host waits.

    Args:
        config: of the model.
        has_row_kernel: see kernels.Choice; without, transformers makes masks for rows.

    Returns:
        The name to build it with.
    """
    for name in (PLAIN, MASKED):
        AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(MASKED, sdpa_mask)
    kinds = set(getattr(config, "layer_types", None) or ())
    has_window = any(getattr(config, name, None) for name in WINDOWS) and not kinds
    needs_masks = not has_row_kernel or has_window or kinds - {"full_attention"}
    return MASKED if needs_masks else PLAIN


def attend(module, query, key, value, attention_mask, **kwargs):
    """Attention as transformers calls it: its own SDPA, unless the layer keeps the result.

    Args:
        module: its `saved` (SavedActivations) is set while a layer runs that saves its results.
        query: [B, N, T, D].
        key, value: [B, N or fewer, T, D].
        attention_mask: None = causal.
        kwargs: as transformers has them (dropout, scaling, is_causal, ...).

    Returns:
        ([B, T, N, D], None).

    Raises:
        UserError: a keyword asks for what is not computed here, such as sinks (code 2).
    """
    unknown = [key for key in kwargs if key not in KEYWORDS and kwargs[key] is not None]
    if unknown:
        rule = f"{type(module).__name__} wants {unknown[0]}, which it does not compute"
        raise UserError("--attn sdpa", rule, "use --attn eager")
    saved = getattr(module, "saved", None)
    bounds = kwargs.get("cu_seq_lens_q")
    if bounds is not None and attention_mask is None and query.device.type == "cuda":
        return _attend_rows(query, key, value, kwargs, bounds, saved), None
    is_plain = attention_mask is None and not kwargs.get("dropout")
    is_plain = is_plain and query.shape[2] == key.shape[2] and query.shape[2] > 1
    scale = kwargs.get("scaling")
    is_own = saved is not None or (torch.is_grad_enabled() and _is_long(query.transpose(1, 2)))
    kernel = _kernel(query, key, value, scale) if is_own and is_plain else None
    if kernel is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if query.device.type == "cpu":  # its kernel wants as many key heads as query heads
        num_groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(num_groups, 1) for t in (key, value))
    out = _run(query, key, value, scale, kernel, saved)
    return out.transpose(1, 2).contiguous(), None


def _attend_rows(query, key, value, kwargs: dict, bounds, saved) -> torch.Tensor:
    """Attention inside each row of the one sequence, [1, T, N, D]."""
    rest = {"bounds": bounds, "longest": kwargs["max_length_q"]}
    kernel = partial(_rows, **rest), partial(_rows_backward, **rest)
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    return _run(query, key, value, kwargs.get("scaling"), kernel, saved).unsqueeze(0)


def _run(query, key, value, scale, kernel, saved) -> torch.Tensor:
    done = saved.take() if saved is not None and saved.is_replay else None
    out, *rest = SavedAttention.apply(query, key, value, scale, kernel, done)
    if saved is not None and done is None:
        saved.store(out.detach(), *rest)
    return out


_cpu = partial(aten._scaled_dot_product_flash_attention_for_cpu, is_causal=True)
_cpu_backward = partial(
    aten._scaled_dot_product_flash_attention_for_cpu_backward, dropout_p=0.0, is_causal=True
)


def _flash(query, key, value, scale) -> tuple[torch.Tensor, ...]:
    out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)
    return out[0], out[1], out[6], out[7]  # the two last: state of dropout, which there is none of


def _flash_backward(
    grad_out, query, key, value, out, log_sum, *state, scale
) -> tuple[torch.Tensor, ...]:
    lengths = None, None, query.shape[2], key.shape[2]  # None: no row is made of several
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, query, key, value, out, log_sum, *lengths, 0.0, True, *state, scale=scale
    )


def _cudnn(query, key, value, scale) -> tuple[torch.Tensor, ...]:
    out = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, scale=scale
    )
    return out[0], out[1], out[6], out[7]


def _cudnn_backward(
    grad_out, query, key, value, out, log_sum, *state, scale
) -> tuple[torch.Tensor, ...]:
    lengths = None, None, query.shape[2], key.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, query, key, value, out, log_sum, *state, None, *lengths, 0.0, True, scale=scale
    )


def _rows(query, key, value, scale, bounds, longest) -> tuple[torch.Tensor, ...]:
    lengths = bounds, bounds, longest, longest
    out = aten._flash_attention_forward(query, key, value, *lengths, 0.0, True, False, scale=scale)
    return out[:4]


def _rows_backward(
    grad_out, query, key, value, out, log_sum, *state, scale, bounds, longest
) -> tuple[torch.Tensor, ...]:
    lengths = bounds, bounds, longest, longest
    return aten._flash_attention_backward(
        grad_out, query, key, value, out, log_sum, *lengths, 0.0, True, *state, scale=scale
    )


KERNELS: dict[Any, tuple[Callable, Callable]] = {
    "cpu": (_cpu, _cpu_backward),
    SDPBackend.FLASH_ATTENTION: (_flash, _flash_backward),
    SDPBackend.CUDNN_ATTENTION: (_cudnn, _cudnn_backward),
}


def _kernel(query, key, value, scale) -> tuple[Callable, Callable] | None:
    """The kernel that PyTorch's SDPA would choose, if it is one whose result can be saved."""
    if query.shape[-1] != value.shape[-1] or query.shape[-1] not in HEAD_SIZES:
        return None  # SDPA pads these
    if query.device.type == "cpu":
        return KERNELS["cpu"]
    choice = torch._fused_sdp_choice(
        query, key, value, None, 0.0, True, scale=scale, enable_gqa=True
    )
    return KERNELS.get(SDPBackend(choice))


def _is_long(query: torch.Tensor) -> bool:
    """Whether the backward kernel's own copies are worth sparing; [..., N, D]."""
    return query.shape[:-2].numel() > LONG_TOKENS


def _by_heads(backward: Callable, grad_out, tensors: Sequence[torch.Tensor], scale) -> tuple:
    """The backward of a kernel, some heads after the others, in whatever it makes of each.

    Flash attention sums the gradient of the queries in float32, and has those of keys and values
    for every query head. Heads are the second dimension, of the log-sum-exp of rows the first.
    """
    query, key, value, out, log_sum, *state = tensors
    parts = head_parts(key.shape[1])
    columns = [t.chunk(parts, 1) for t in (grad_out, query, key, value, out)]
    columns.append([t.contiguous() for t in log_sum.chunk(parts, 1 if query.dim() == 4 else 0)])
    grads = tuple(map(torch.empty_like, (query, key, value)))
    columns += [grad.chunk(parts, 1) for grad in grads]
    for *own, grad_query, grad_key, grad_value in zip(*columns, strict=True):
        found = backward(*own, *state, scale=scale)
        for place, grad in zip((grad_query, grad_key, grad_value), found, strict=True):
            place.copy_(grad)
    return grads


class SavedAttention(torch.autograd.Function):
    """PyTorch's own attention, forward and backward, or only the latter of a saved result.

    Args:
        query, key, value: [B, N, T, D]; for rows [T, N, D].
        scale: of the scores; None = D ** -0.5.
        kernel: (forward, backward), such as a row of KERNELS.
        done: what a former call returned, taken over without computing; or None.

    Returns:
        out, shaped as query, log-sum-exp of the scores, and what else the backward kernel asks for.
    """

    @staticmethod
    def forward(ctx, query, key, value, scale, kernel, done):
        ctx.set_materialize_grads(False)
        ctx.scale, (forward, ctx.backward_kernel) = scale, kernel
        results = done or forward(query, key, value, scale=scale)
        ctx.mark_non_differentiable(*results[1:])
        ctx.save_for_backward(query, key, value, *results)
        return results

    @staticmethod
    def backward(ctx, grad_out, *_):
        tensors, backward = ctx.saved_tensors, ctx.backward_kernel
        query = tensors[0] if tensors[0].dim() == 3 else tensors[0].transpose(1, 2)
        if _is_long(query):
            grads = _by_heads(backward, grad_out, tensors, ctx.scale)
        else:
            grads = backward(grad_out, *tensors, scale=ctx.scale)
        return *grads, None, None, None
