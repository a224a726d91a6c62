"""Preference objectives: formulas, options, and the losses of single tokens that they weigh."""

import math
from types import SimpleNamespace

import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.errors import UserError
from fsdp_qlora.model.head import LossHead, Targets
from fsdp_qlora.training import objectives
from fsdp_qlora.training.objectives import Answers, Strength

BETA, GAMMA, SMOOTHING = 0.3, 0.7, 0.2


def _sigmoid(x):
    return 1 / (1 + math.exp(-x))


def _log_odds(p):
    return math.log(p / (1 - p))


# Chosen and rejected: (log-probability, of the reference, tokens) -> loss, in Python's float64.
BY_HAND = {
    "dpo": lambda c, r: -math.log(_sigmoid(BETA * (c[0] - c[1] - r[0] + r[1]))),
    "hinge": lambda c, r: max(0.0, 1 - BETA * (c[0] - c[1] - r[0] + r[1])),
    "ipo": lambda c, r: ((c[0] - c[1]) / c[2] - (r[0] - r[1]) / r[2] - 0.5 / BETA) ** 2,
    "robust": lambda c, r: (
        (
            -(1 - SMOOTHING) * math.log(_sigmoid(BETA * (c[0] - c[1] - r[0] + r[1])))
            + SMOOTHING * math.log(_sigmoid(BETA * (r[0] - r[1] - c[0] + c[1])))
        )
        / (1 - 2 * SMOOTHING)
    ),
    "apo_zero": lambda c, r: 1 - _sigmoid(BETA * (c[0] - c[1])) + _sigmoid(BETA * (r[0] - r[1])),
    "apo_down": lambda c, r: (
        _sigmoid(BETA * (c[0] - c[1])) + 1 - _sigmoid(BETA * (c[0] - c[1] - r[0] + r[1]))
    ),
    "orpo": lambda c, r: (
        -BETA
        * math.log(_sigmoid(_log_odds(math.exp(c[0] / c[2])) - _log_odds(math.exp(r[0] / r[2]))))
    ),
    "cpo": lambda c, r: -math.log(_sigmoid(BETA * (c[0] - r[0]))),
    "simpo": lambda c, r: -math.log(_sigmoid(BETA * (c[0] / c[2] - r[0] / r[2]) - GAMMA)),
}


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


@pytest.mark.parametrize("name", objectives.PAIRED)
def test_losses_and_their_gradients_are_those_of_the_formula_by_hand(name):
    by = Strength(BETA, GAMMA, SMOOTHING)
    sides, exact = _sides(), _sides(torch.float64)
    loss = objectives.PAIRED[name](*sides, by)
    rows = zip(*(zip(*(t.tolist() for t in side), strict=True) for side in sides), strict=True)
    wanted = torch.tensor([BY_HAND[name](c, r) for c, r in rows])
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for side, own in zip(exact, sides, strict=True):
            for a, b in zip(side, own, strict=True):
                a.copy_(b)
    loss.sum().backward()
    assert torch.autograd.gradcheck(
        lambda c, r: objectives.PAIRED[name](
            exact[0]._replace(policy_P=c), exact[1]._replace(policy_P=r), by
        ),
        (exact[0].policy_P, exact[1].policy_P),
    )
    objectives.PAIRED[name](*exact, by).sum().backward()
    for side, own in zip(exact, sides, strict=True):
        torch.testing.assert_close(
            own.policy_P.grad.double(), side.policy_P.grad, rtol=1e-4, atol=1e-6
        )


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


def test_orpo_cpo_and_simpo_are_those_of_trl():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    by = Strength(BETA, GAMMA)
    chosen, rejected = (s._replace(reference_P=torch.zeros_like(s.length_P)) for s in _sides())
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device="cpu"), alpha=0.0)
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen.mean_P, rejected.mean_P)
    torch.testing.assert_close(objectives.orpo(chosen, rejected, by), -losses)
    trainer.simpo_gamma, trainer.label_smoothing = GAMMA, 0.0
    for name, kind in (("cpo", "sigmoid"), ("simpo", "simpo")):
        trainer.loss_type = kind
        logs = [side.mean_P if name == "simpo" else side.policy_P for side in (chosen, rejected)]
        losses, rewards, _ = CPOTrainer.cpo_loss(trainer, *logs)
        torch.testing.assert_close(objectives.PAIRED[name](chosen, rejected, by), losses)
        pairs = (torch.stack(both, 1) for both in zip(chosen, rejected, strict=True))
        whole, by_name = Answers(*(p.flatten() for p in pairs)), objectives.Preference(name, by)
        loss, sums = by_name.compare(whole, None, torch.zeros(()))
        torch.testing.assert_close(loss, losses.sum())
        figures = by_name.figures(sums)
        torch.testing.assert_close(figures["rewards_chosen"], rewards.mean())
        wins = (logs[0] > logs[1]).float().mean()
        torch.testing.assert_close(figures["accuracy"], wins)


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
