"""Choosing kernels: dtype, attention, and Liger's fused RMSNorm, RoPE, SwiGLU where they help."""

import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Choice:
    """What a run computes with.

    Attributes:
        dtype: of products and activations.
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


def choose(
    attn: str, liger: str, compute_dtype: str, device: torch.device, softcaps: bool
) -> Choice:
    """Resolve `--attn` and `--liger` for a device.

    flash-attn serves where it is installed and there is a GPU, else SDPA, which runs PyTorch's own
    flash kernel.

    Args:
        attn: "auto" or transformers' name.
        liger: "auto" or "off".
        compute_dtype: name in torch, "bfloat16".
        device: where the run computes.
        softcaps: the model soft-caps its attention scores (Gemma 2), which SDPA leaves out.
    """
    has_gpu = device.type == "cuda"
    attention, attention_why = attn, "as asked"
    if attn == "auto":
        has_flash = has_gpu and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if has_flash else "eager" if softcaps else "sdpa"
        missing = "flash-attn not installed" if has_gpu else "no GPU"
        attention_why = "installed" if has_flash else missing + ", soft-capped" * softcaps
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    use_liger = liger == "auto" and has_gpu and has_liger
    liger_why = "as asked" if liger == "off" else "not installed" if has_gpu else "no GPU"
    note = f"{compute_dtype}, attention {attention} ({attention_why}), Liger "
    note += "on" if use_liger else f"off ({liger_why})"
    has_rows = has_gpu and compute_dtype != "float32"
    has_rows = has_rows and torch.cuda.get_device_capability(device) >= (8, 0)
    return Choice(getattr(torch, compute_dtype), attention, use_liger, has_rows, note)


def apply_liger(hf_model: "PreTrainedModel") -> None:
    """Let Liger's own API exchange the kernels of a transformers model.

    The loss stays ours: its head is sharded in a group of its own.

    Args:
        hf_model: changed in place; left alone where Liger does not know its type.
    """
    # Liger warns of every backend that it cannot import.
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(hf_model.config.model_type)
    if apply is not None:
        apply(
            model=hf_model,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
            rope=True,
            rms_norm=True,
            swiglu=True,
        )
