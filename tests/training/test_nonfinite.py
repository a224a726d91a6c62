"""A step whose loss or gradient is not finite on any rank leaves no trace but its record."""

import dataclasses
import hashlib
import itertools
import json
import math

import pytest
import torch

from fsdp_qlora.data import tokens
from fsdp_qlora.data.batches import Batches, SamplerConfig
from fsdp_qlora.errors import UserError
from fsdp_qlora.model import shard
from fsdp_qlora.training import loop, optim
from tests import tiny
from tests.model.test_shard import FLAGS, make_samples, micro_batches
from tests.ranks import run_ranks

WHO = {"0": (0,), "1": (1,), "both": (0, 1)}
INJECTIONS = list(itertools.product(WHO, ("forward", "backward"), ("nan", "inf")))


class Injector:
    """Spoils the final norm's output, or one number of a layer's gradient, where told to."""

    def __init__(self, model):
        self.where, self.value = "", 1.0
        model.decoder.norm.register_forward_hook(self.forward)
        list(shard.blocks(model))[1].register_forward_hook(self.backward)

    def forward(self, _module, _args, out):
        return out * self.value if self.where == "forward" else None

    def backward(self, _module, _args, out):
        if self.where == "backward":
            out.register_hook(self.spoilt)

    def spoilt(self, grad):
        grad = grad.clone()
        grad.view(-1)[0] = self.value
        return grad


def state_hash(trained):
    digest = hashlib.sha256()
    moments = (v for p in trained.params for v in trained.optimizer.state[p].values())
    for tensor in itertools.chain(trained.params, moments):
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def step(trained, number, num_micro=2):
    world = trained.world
    batches = micro_batches(world.rank, world.size, num_micro)
    return loop.train_step(trained, batches, number)


def inject(world, path, optimizer):
    flags = (*FLAGS, "--lr=0.01", f"--optimizer={optimizer}", "--apply_gradient_clipping=true")
    model, _, cfg = tiny.build(path, world, *flags, "--max_skipped_steps=99")
    trained = optim.prepare(model, cfg, 99, world)
    injector, found = Injector(model), []
    hashes = [state_hash(trained)]
    cases = INJECTIONS if optimizer == "adamw" else INJECTIONS[5:7]
    for number, (who, where, value) in enumerate([("", "", "1"), *cases, ("", "", "1")], 1):
        injector.where = where if world.rank in WHO.get(who, ()) else ""
        injector.value = float(value)
        before = state_hash(trained)
        results = step(trained, number)
        found.append((bool(results["skipped"]), before == state_hash(trained)))
    hashes.append(state_hash(trained))
    skipped = list(trained.guard.skipped_steps(NoRows(), is_last=True))
    return found, [(s.step, s.ranks, s.is_loss) for s in skipped], hashes


class NoRows:
    def places(self, step, rank):
        return [f"{step}:{rank}"]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adadelta"])
def test_injected_nan_and_inf_change_no_weight_and_no_moment(tmp_path, optimizer):
    """{rank 0, rank 1, both} x {forward, backward} x {NaN, inf}, between two good steps."""
    path = tiny.save_model(tmp_path / "model")
    by_rank = run_ranks(inject, 2, path, optimizer)
    cases = INJECTIONS if optimizer == "adamw" else INJECTIONS[5:7]
    for found, skipped, (first, last) in by_rank:
        assert found == [(False, False), *[(True, True)] * len(cases), (False, False)]
        assert first != last
        assert skipped == [
            (number, WHO[who], where == "forward")
            for number, (who, where, _) in enumerate(cases, 2)
        ]


def fit(world, path, out, fault, *flags):
    """Six steps of loop.fit; the last records of the metrics, and what stopped it."""
    model, _, cfg = tiny.build(path, world, *FLAGS, *flags)
    trained = optim.prepare(model, cfg, 6, world)
    start = state_hash(trained)
    dealing = SamplerConfig(2, 1, world.size, world.rank, 0, 1, -1)
    batches = Batches(tokens.of_samples(make_samples(24), "rows"), dealing)
    injector, error, done = Injector(model), None, itertools.count(2)

    def next_step():
        injector.where, injector.value = fault.get(next(done), ("", 1.0))
        injector.where = injector.where if world.rank == 1 else ""

    with tiny.recorder(out, world, batches.num_steps) as recorder:
        next_step() if 1 in fault else None
        try:
            loop.fit(trained, batches, recorder, tiny.unsaved(), next_step)
        except UserError as caught:
            error = caught
    return error and (str(error), error.code), start == state_hash(trained), batches.rows(2)


def both_fits(world, path, out):
    once = fit(world, path, out / "once", {3: ("forward", math.nan)})
    flags = ("--max_skipped_steps=2", "--gradient_accumulation_steps=1")
    return once, fit(world, path, out / "often", {2: ("backward", math.inf)} | BAD, *flags)


BAD = {3: ("forward", math.inf), 4: ("forward", math.nan)}


def test_the_record_names_step_rank_and_rows_and_a_row_of_skips_ends_the_run(tmp_path):
    path = tiny.save_model(tmp_path / "model")
    by_rank = run_ranks(both_fits, 2, path, tmp_path)
    for once, often in by_rank:
        assert once[0] is None
        assert often[0][1] == 4
        assert by_rank[0][1][0] == often[0]
    text = by_rank[0][1][0][0]
    assert text.startswith("2 steps in a row were skipped, the last: step 3 skipped: loss not")
    assert "on rank 1" in text and "weights are those before" in text
    lines, steps = tiny.lines(tmp_path / "once"), tiny.steps(tmp_path / "once")
    assert [line["skipped"] for line in steps] == [False, False, True, False, False, False]
    (event,) = [line for line in lines if line.get("event") == "skipped"]
    assert (event["step"], event["ranks"], event["is_loss"]) == (3, [1], True)
    mine = by_rank[0][0][2][1::2]
    assert event["places"] == [f"rows row {row + 1}" for row in mine.tolist()]
    summary = json.loads((tmp_path / "once" / "summary.json").read_text())
    assert summary["num_skipped_steps"] == 1
    steps = [
        line["step"] for line in tiny.lines(tmp_path / "often") if line.get("event") == "skipped"
    ]
    assert steps == [2, 3]


def masked(world, path):
    """A step whose second micro-batch trains nothing on rank 1, and on no rank."""
    model, _, cfg = tiny.build(path, world, *FLAGS)
    trained, found = optim.prepare(model, cfg, 2, world), []
    for silent in ((1,), (0, 1)):
        first, second = micro_batches(world.rank, world.size, 2)
        if world.rank in silent:
            labels = torch.full_like(second.labels, -100)
            second = dataclasses.replace(second, labels=labels, num_trained_tokens=0)
        batches = [second] if len(silent) == 2 else [first, second]
        results = loop.train_step(trained, batches)
        num_tokens = world.sum(sum(b.num_trained_tokens for b in batches))
        found.append(({name: value.item() for name, value in results.items()}, num_tokens))
    return found


def test_rows_in_which_nothing_is_trained_add_no_token_and_stay_finite(tmp_path):
    """Reference: the mean loss of the other rows, by transformers on one process."""
    from transformers import AutoModelForCausalLM

    path = tiny.save_model(tmp_path / "model")
    ((some, num_tokens), (none, _)), _ = run_ranks(masked, 2, path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            module.weight.data = tiny.dequantized(module.weight.data, "nf4_dq")
    loss_sum = 0.0
    for batch in (*micro_batches(0, 2, 2), micro_batches(1, 2, 2)[0]):
        logits = model(input_ids=batch.input_ids).logits[:, :-1].flatten(0, 1)
        labels = batch.labels[:, 1:].flatten()
        loss_sum += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert some["loss"] == pytest.approx(loss_sum / num_tokens, rel=1e-5)
    assert not some["skipped"]
    assert none == {"loss": 0.0, "grad_norm": 0.0, "skipped": False}


def scales(world, path):
    """The scaler's path beside torch's own, over steps some of which overflow."""
    model, _, cfg = tiny.build(path, world, *FLAGS[1:], "--precision=fp16_autocast", "--lr=0.01")
    trained = optim.prepare(model, cfg, 30, world)
    injector = Injector(model)
    theirs = torch.amp.GradScaler(world.device.type, growth_interval=optim.GROWTH_STEPS)
    param = torch.nn.Parameter(torch.zeros(2, device=world.device))
    sgd, found = torch.optim.SGD([param], lr=0.0), []
    bad = (0, 1, 2, 3, 7)
    trained.guard._growth.fill_(0)
    for number in range(12):
        injector.where = "backward" if number in bad and world.rank == 1 else ""
        injector.value = math.inf
        trained.guard._growth.fill_(optim.GROWTH_STEPS - 1) if number == 10 else None
        theirs._growth_tracker.fill_(optim.GROWTH_STEPS - 1) if number == 10 else None
        results = step(trained, number + 1)
        param.grad = theirs.scale(torch.full_like(param, math.inf if number in bad else 0.1))
        theirs.step(sgd)
        theirs.update()
        scale = (trained.guard.scale.item(), theirs.get_scale())
        found.append((bool(results["skipped"]), *scale, results["loss"].item()))
    num_skipped = len(list(trained.guard.skipped_steps(NoRows(), is_last=True)))
    return found, num_skipped, trained.guard.num_in_a_row


def test_float16_is_scaled_as_torch_does_it_on_what_all_ranks_found(tmp_path):
    path = tiny.save_model(tmp_path / "model")
    for found, num_skipped, num_in_a_row in run_ranks(scales, 2, path):
        assert [mine for _, mine, _, _ in found] == [theirs for _, _, theirs, _ in found]
        assert [n for n, row in enumerate(found) if row[0]] == [0, 1, 2, 3, 7]
        assert (num_skipped, num_in_a_row) == (5, 0)  # the scale is to blame, not the rows
        losses = [row[3] for row in found]
        assert losses[3] == losses[0] and losses[-1] < losses[0]
        assert found[10][1] == 2 * found[9][1]
