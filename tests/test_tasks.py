"""How likely a continuation is, as lm-eval asks: batches of rows on two ranks."""

import numpy as np
import pytest

from tests import tiny
from tests.ranks import run_ranks


def _score(world, path, rows):
    from fsdp_qlora.inference import score

    model, _, _ = tiny.build(path, world, "--precision=fp32", "--train_type=lora")
    model.eval()
    return [score(model, rows, size, world.device) for size in (1, 3)]


def _reference(path):
    """transformers alone over the same rounded base: ids -> logits [T, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            module.weight.data = module.weight.data.bfloat16().float()
    return torch.no_grad()(lambda ids: model(torch.tensor([ids])).logits[0])


def test_scores_are_those_of_transformers_whatever_the_batch(tmp_path):
    """Rows of unlike lengths side by side; two of them are what the model would say itself."""
    path = tiny.save_model(tmp_path / "model", initializer_range=0.1)
    logits_of, random = _reference(path), np.random.default_rng(0)
    rows = []
    for num_given, num_said in ((3, 2), (9, 1), (1, 6), (20, 3), (5, 5)):
        given, said = random.integers(3, 250, num_given).tolist(), []
        for _ in range(num_said):
            likeliest = int(logits_of(given + said)[-1].argmax())
            said.append(likeliest if len(rows) < 2 else int(random.integers(3, 250)))
        rows.append((given, said))
    expected = []
    for given, said in rows:
        log_probs = logits_of(given + said)[len(given) - 1 : -1].log_softmax(1)
        expected.append(sum(log_probs[i, token].item() for i, token in enumerate(said)))
    for ours in (found for rank in run_ranks(_score, 2, path, rows) for found in rank):
        assert [is_greedy for _, is_greedy in ours] == [True, True, False, False, False]
        assert [value for value, _ in ours] == pytest.approx(expected, rel=1e-4)
