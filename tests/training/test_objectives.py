"""Preference objectives: formulas, options, and the losses of single tokens that they weigh."""

import math

import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.errors import UserError
from fsdp_qlora.model.head import LossHead, Targets
from fsdp_qlora.training import objectives
from fsdp_qlora.training.objectives import Answers, Strength

BETA = 0.3


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _sides(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sides = []
    for _ in range(2):
        length = torch.randint(1, 40, (64,), generator=generator).to(dtype)
        policy, reference = (
            -length * torch.rand(64, generator=generator, dtype=dtype) * scale + -1e-3
            for scale in (2.0, 2.2)
        )
        sides.append(Answers(policy.requires_grad_(), reference, length))
    return sides


def test_kto_and_its_divergence_are_those_of_the_formula_by_hand():
    (answers, _), by = _sides(), Strength(BETA)
    sign = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0)
    assert objectives.divergence(torch.tensor(-3.0), 4) == 0
    z = objectives.divergence(torch.tensor(3.0, requires_grad=True), 4)
    assert z == 0.75 and not z.requires_grad
    loss = objectives.kto(answers, sign, z, by)
    rows = zip(sign.tolist(), answers.ratio_P.tolist(), strict=True)
    wanted = [1 - _sigmoid(s * BETA * (ratio - 0.75)) for s, ratio in rows]
    torch.testing.assert_close(loss, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_defaults_are_those_of_trl_and_options_of_other_objectives_are_refused():
    from trl import DPOConfig, KTOConfig
    from trl.experimental.cpo import CPOConfig
    from trl.experimental.orpo import ORPOConfig

    fields = {
        cls: cls.__dataclass_fields__ for cls in (DPOConfig, KTOConfig, CPOConfig, ORPOConfig)
    }
    cfg = config.parse(["--objective=cpo"])
    assert {own["beta"].default for own in fields.values()} == {cfg.beta}
    cpo = fields[CPOConfig]
    assert (cpo["simpo_gamma"].default, cpo["cpo_alpha"].default) == (
        cfg.simpo_gamma,
        cfg.nll_weight,
    )
    assert fields[DPOConfig]["label_smoothing"].default == cfg.label_smoothing
    assert config.parse(["--objective=simpo"]).nll_weight == 0  # SimPO alone
    assert config.parse(["--objective=dpo", "--sft_weight=2"]).nll_weight == 2
    for flags in (
        ["--objective=dpo", "--label_smoothing=0.1"],
        ["--objective=orpo", "--sft_weight=1"],
        ["--objective=orpo", "--reference=cached"],
        ["--objective=dpo", "--train_on=all"],
        ["--beta=0.2"],
    ):
        with pytest.raises(UserError, match=flags[-1].partition("=")[0]):
            config.parse(flags)


@pytest.mark.parametrize("scale, softcap, has_bias", [(1.0, None, False), (0.5, 5.0, True)])
def test_losses_of_single_tokens_and_their_weighted_gradients_are_exact(scale, softcap, has_bias):
    torch.manual_seed(0)
    hidden, vocab, num = 16, 50_000, 1700  # of several chunks
    weight = torch.nn.Parameter(torch.randn(vocab, hidden) * 0.1)
    bias = torch.nn.Parameter(torch.randn(vocab), requires_grad=False) if has_bias else None
    head = LossHead(weight, bias, scale, softcap)
    x = torch.randn(1, num, hidden, requires_grad=True)
    targets = Targets(torch.arange(num), torch.randint(vocab, (num,)))
    coefficients = torch.randn(num)
    losses = head(x, targets._replace(is_single=True))
    (losses * coefficients).sum().backward()
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    logits = torch.nn.functional.linear(
        exact_x[0], exact_weight, bias.double() if has_bias else None
    )
    logits = logits * scale
    logits = logits if softcap is None else (logits / softcap).tanh() * softcap
    wanted = torch.nn.functional.cross_entropy(logits, targets.tokens_N, reduction="none")
    (wanted * coefficients).sum().backward()
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    for own, other in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        torch.testing.assert_close(own.double(), other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head(x, targets), losses.detach().sum())
