"""What lm-eval asks of the model: the logits of rows, side by side, on two ranks."""

import numpy as np
import pytest

from tests import tiny
from tests.ranks import run_ranks


def _logits(world, path, rows):
    import torch

    from fsdp_qlora.inference import all_logits

    model, _, _ = tiny.build(path, world, "--precision=fp32", "--train_type=lora")
    ids_BT = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    return all_logits(model.eval(), ids_BT).tolist()


def test_logits_are_those_of_transformers_whatever_the_batch(tmp_path):
    """Rows of unlike lengths, over the same rounded base."""
    import torch
    from transformers import AutoModelForCausalLM

    path = tiny.save_model(tmp_path / "model", initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            module.weight.data = module.weight.data.bfloat16().float()
    random = np.random.default_rng(0)
    rows = [random.integers(3, 250, length).tolist() for length in (5, 10, 23)]
    expected = [torch.no_grad()(model)(torch.tensor([row])).logits[0] for row in rows]
    for ours in run_ranks(_logits, 2, path, rows):
        for row, wanted in zip(ours, expected, strict=True):
            got = torch.tensor(row[: len(wanted)])
            assert got.numpy() == pytest.approx(wanted.numpy(), abs=1e-4)
