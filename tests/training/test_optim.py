"""Optimizers and schedules: torch's own steps, weight decay where it belongs, refusals."""

import pkgutil

import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.config import OPTIMIZERS, SCHEDULERS
from fsdp_qlora.errors import ENVIRONMENT, UserError
from fsdp_qlora.training import optim

NAMES = [
    "layers.0.body.lora",
    "layers.0.body.layer.input_layernorm.weight",
    "layers.0.body.layer.self_attn.q_proj.bias",
    "decoder.norm.weight",
]
REFERENCES = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=False),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, foreach=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, foreach=False),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.1, foreach=False),
}


def _params():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(6, generator=generator)) for _ in NAMES]


@pytest.mark.parametrize("name", REFERENCES)
def test_three_steps_are_those_of_torch_and_norms_and_biases_do_not_decay(name):
    cfg = config.parse([f"--optimizer={name}", "--lr=0.1", "--wd=0.5", "--lr_scheduler=constant"])
    own, theirs = _params(), _params()
    optimizer, schedule = optim.build(own, cfg, 3, NAMES)
    decay = 0.5 if OPTIMIZERS[name].decays else 0.0
    groups = [{"params": theirs[:1], "weight_decay": decay}]
    reference = REFERENCES[name]([*groups, {"params": theirs[1:], "weight_decay": 0.0}])
    for number in range(3):
        for a, b in zip(own, theirs, strict=True):
            a.grad = b.grad = torch.sin(a.detach() * (number + 3))
        optim.step(optimizer, torch.zeros(()))
        schedule.step()
        reference.step()
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    state_bytes = sum(t.nbytes for t in optimizer.state[own[0]].values() if t.dim())
    assert state_bytes == OPTIMIZERS[name].state_bytes * own[0].numel()  # as the plan has it


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if not row.on_cpu])
def test_kernels_for_cards_are_refused_on_the_cpu_in_one_line(name):
    cfg = config.parse([f"--optimizer={name}"])
    with pytest.raises(UserError, match="ranks compute on the CPU; use adamw") as caught:
        optim.build(_params(), cfg, 3, NAMES)
    assert caught.value.code == ENVIRONMENT
    assert issubclass(pkgutil.resolve_name(OPTIMIZERS[name].kind), torch.optim.Optimizer)


def test_the_rate_rises_then_follows_its_schedule():
    rates = {name: [optim.factor(name, step, 8, 0.25) for step in range(9)] for name in SCHEDULERS}
    assert rates["constant"] == [1.0] * 9
    assert rates["constant_with_warmup"] == [1 / 3, 2 / 3, *[1.0] * 7]
    assert rates["linear"] == pytest.approx([1 / 3, 2 / 3, *[1 - i / 6 for i in range(7)]])
    assert rates["cosine"][5] == pytest.approx(0.5) and rates["cosine"][8] == pytest.approx(0)
    assert set(optim.SCHEDULES) == set(SCHEDULERS)


def test_clipping_undoes_the_loss_scale_too():
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    scaled = [grad * 1024 for grad in grads]
    optim.clip(scaled, torch.tensor(5.0), 1.0, torch.tensor(1024.0))
    optim.clip(grads, torch.tensor(5.0), 1.0)
    torch.testing.assert_close(scaled, grads)
    assert torch.stack(torch._foreach_norm(grads)).norm().item() == pytest.approx(1.0, rel=1e-6)
    optim.clip(grads, torch.tensor(1.0), None)
    assert grads[1].item() == pytest.approx(0.8)
