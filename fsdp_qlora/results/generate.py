"""Answers of the sharded model: greedy, the same on every rank."""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def answer(
    model: nn.Module, tokenizer: Any, prompt: str, num_tokens: int, device: torch.device
) -> str:
    """The model's continuation of a prompt; every rank must call it, with the same arguments.

    Args:
        model: a PackedModel, sharded or not; its mode is left as it was.
        tokenizer: transformers tokenizer.
        prompt: text as the model was trained to see it.
        num_tokens: longest answer, in tokens.
        device: of this rank.

    Returns:
        The answer alone, without special tokens.
    """
    from transformers import DynamicCache

    was_training = model.training
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    cache, answer_ids = DynamicCache(), []
    for _ in range(num_tokens):
        next_id = model(ids, past_key_values=cache)[0, -1].argmax().item()
        if next_id == tokenizer.eos_token_id:
            break
        answer_ids.append(next_id)
        ids = torch.tensor([[next_id]], device=device)
    model.train(was_training)
    return tokenizer.decode(answer_ids, skip_special_tokens=True).strip()
