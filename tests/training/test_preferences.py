"""Training on preferences: losses, gradients and figures are TRL's, however the step is cut."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.data.batches import Batches, PackedBatches, sampler_config
from fsdp_qlora.data.tokens import Sample, of_samples
from fsdp_qlora.model import shard
from fsdp_qlora.training import evaluate, loop, losses, optim
from fsdp_qlora.training.objectives import FIGURES, Preference
from tests import tiny
from tests.ranks import run_ranks

FLAGS = ("--precision=fp32", "--lora_rank=4", "--lora_alpha=8", "--lora_dropout=0")
FLAGS += ("--optimizer=sgd", "--lr=1", "--lr_scheduler=constant", "--apply_gradient_clipping=false")
FLAGS += ("--batch_size=2", "--context_length=24", "--gradient_accumulation_steps=2")
NUM = 8  # rows of a step: of 2 ranks x 2 micro-batches
# Objective -> its options, of ours and of TRL's trainer.
OBJECTIVES = {
    "dpo": ((), {"loss_type": ["sigmoid"]}),
    "dpo, sft": (
        ("--sft_weight=0.5",),
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]},
    ),
    "ipo": ((), {"loss_type": ["ipo"]}),
    "apo_zero": ((), {"loss_type": ["apo_zero"]}),
    "apo_down": ((), {"loss_type": ["apo_down"]}),
    "hinge": ((), {"loss_type": ["hinge"]}),
    "robust": (("--label_smoothing=0.2",), {"loss_type": ["robust"], "label_smoothing": 0.2}),
    "orpo": (("--beta=0.3",), {"beta": 0.3}),
    "cpo": ((), {}),
    "simpo": (("--cpo_alpha=0.7",), {"loss_type": "simpo", "cpo_alpha": 0.7}),
    "kto": ((), {}),
    "kto_apo_zero": ((), {"loss_type": "apo_zero_unpaired"}),
}
# How the base lies and the step is cut.
CUTS = {
    "streamed, padded": (),
    "sharded, packed": ("--use_cpu_offload=false", "--packing=on"),
    "packed, shared prompts": ("--packing=on", "--selective_layers=1"),
    "offloaded, all in one visit": ("--offload_impl=fsdp", "--accumulate_by_layer=2"),
    "cached": ("--reference=cached", "--selective_layers=1"),
}


def samples(objective):
    """Rows with prompts of 3 to 9 tokens; the answers of a pair are of unlike lengths."""
    random, made = np.random.default_rng(0), []
    for number in range(NUM):
        prompt, first, second = random.integers(3, 10, 3).tolist()
        is_pair = not objective.startswith("kto")
        ids = random.integers(3, 250, prompt + first + second * is_pair).astype(np.int32)
        label = 0 if is_pair else 1 - 2 * (number % 3 == 0)
        made.append(
            Sample(ids, np.arange(len(ids)) >= prompt, prompt, (prompt + first) * is_pair, label)
        )
    return of_samples(made, "x")


def step(world, model, trained, cut, case):
    """Loss, figures and whole gradients of one optimizer step, which is taken back."""
    name, flags = case.partition(",")[0], CUTS[cut]
    cfg = config.parse([*FLAGS, f"--objective={name}", *OBJECTIVES[case][0], *flags])
    rows, sampler = samples(name), sampler_config(cfg, world.size, world.rank, 8)
    batches = Batches(rows, sampler)
    if cfg.packing == "on":
        batches = PackedBatches(rows, cfg.context_length, sampler)
        batches.shares_prompts = "shared" in cut and rows.num_sides == 2
        assert not batches.shares_prompts or any(b.branches for b in batches.step(0))
    assert batches.steps_per_epoch == 1
    preference = Preference.of(cfg, trained.preference.can_visit)
    if cfg.has_cached_reference:
        known = losses.reference_of(model, preference, batches.step(0), world, True)
        assert sorted(known.hashes) == sorted(rows.hashes)
        preference = dataclasses.replace(preference, known=known)
    before, kept = shard.whole_lora(model), [param.detach().clone() for param in trained.params]
    results = loop.train_step(dataclasses.replace(trained, preference=preference), batches.step(0))
    grads = [b - a for b, a in zip(before, shard.whole_lora(model), strict=True)]
    torch._foreach_copy_([param.detach() for param in trained.params], kept)
    every = [batches.micro_batches(0, rank) for rank in range(world.size)]
    order = [row for by_rank in zip(*every, strict=True) for micro in by_rank for row in micro]
    figures = {key: results[key].item() for key in ("loss", *FIGURES) if key in results}
    held_out = evaluate.measure(model, preference, batches.step(0), world)
    named = {key: t.numpy() for key, t in tiny.lora_dict(model, grads).items()}
    return figures, named, order, held_out


def run(world, path: Path):
    found, values = {}, {}
    for cut, flags in CUTS.items():
        own = [flag for flag in flags if not flag.startswith(("--packing", "--reference"))]
        model, _, cfg = tiny.build(path, world, *FLAGS, "--objective=dpo", *own)
        values = {k: t.numpy() for k, t in tiny.lora_dict(model, tiny.fill_lora(model)).items()}
        trained = optim.prepare(model, cfg, 1, world)
        assert losses.can_share_prompts(model, world)
        assert trained.preference.can_visit and trained.per_visit == cfg.per_visit
        for case in OBJECTIVES if cut == "streamed, padded" else ("dpo, sft", "orpo", "kto", "ipo"):
            if (cut, case) != ("cached", "orpo"):
                found[case, cut] = step(world, model, trained, cut, case)
    return values, found


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    path = tiny.save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)
    tiny.save_tokenizer(path, ["say la", "it is lo"], 256)
    return path, *run_ranks(run, 2, path)[0]


def padded(rows):
    """Ids, mask and answers of rows of (ids, first token of the answer)."""
    width = max(len(ids) for ids, _ in rows)
    ids, mask, answer = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (row, first) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row.tolist()), 1
        answer[i, first : len(row)] = 1
    return ids, mask, answer


def by_trl(case, order, model, set_lora, path, out):
    """Loss and metrics of TRL's own trainer on all rows at once; `model` holds the gradients."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    name = case.partition(",")[0]
    own = {"orpo": (ORPOTrainer, ORPOConfig), "cpo": (CPOTrainer, CPOConfig)}
    own |= {"simpo": own["cpo"]} | dict.fromkeys(("kto", "kto_apo_zero"), (KTOTrainer, KTOConfig))
    trainer_class, config_class = own.get(name, (DPOTrainer, DPOConfig))
    row = {"prompt": "say", "chosen": " la", "rejected": " lo"}
    if name.startswith("kto"):
        row = {"prompt": "say", "completion": " la", "label": True}
    rest = {"output_dir": str(out), "use_cpu": True, "bf16": False, "report_to": "none"}
    rest |= {"gradient_checkpointing": False, "per_device_train_batch_size": 2}
    args = config_class(**rest, **OBJECTIVES[case][1])
    data, tokenizer = Dataset.from_list([row] * 2), AutoTokenizer.from_pretrained(path)
    trainer = trainer_class(model, args=args, train_dataset=data, processing_class=tokenizer)
    set_lora()
    found = [samples(name)[i] for i in order]
    if name.startswith("kto"):
        rows = [(s.input_ids, s.prompt) for s in found]
        pairs = zip(found, [found[-1], *found[:-1]], strict=True)
        others = [
            (np.append(a.input_ids[: a.prompt], b.input_ids[b.prompt :])[:24], a.prompt)
            for a, b in pairs
        ]
        names = ("input_ids", "attention_mask", "completion_mask")
        inputs = dict(zip(names, padded(rows), strict=True))
        inputs |= dict(zip([f"KL_{n}" for n in names], padded(others), strict=True))
        inputs["label"] = torch.tensor([s.label > 0 for s in found])
        return trainer._compute_loss(trainer.model, inputs, False), trainer._metrics["train"]
    sides = [
        [(row.input_ids, s.prompt) for s in found for row in s.rows()[i : i + 1]] for i in (0, 1)
    ]
    ids, mask, answer = padded(sides[0] + sides[1])
    if trainer_class is DPOTrainer:
        inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": answer}
        return trainer._compute_loss(trainer.model, inputs, False), trainer._metrics["train"]
    batch = {"prompt_input_ids": ids[:NUM], "prompt_attention_mask": mask[:NUM]}
    for side, part in (("chosen", slice(NUM)), ("rejected", slice(NUM, None))):
        labels = ids.masked_fill(answer == 0, -100)[part]
        batch |= {f"{side}_input_ids": ids[part], f"{side}_attention_mask": mask[part]}
        batch |= {f"{side}_labels": labels}
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    return loss, {key: [float(value)] for key, value in metrics.items()}


@pytest.mark.parametrize("case", OBJECTIVES)
def test_two_ranks_and_micro_batches_have_the_step_of_trl_in_one(seen, tmp_path, case):
    """Reference: TRL's trainer over transformers and peft, one process, one micro-batch."""
    path, values, found = seen
    lora = {key: torch.from_numpy(value) for key, value in values.items()}
    cfg = config.parse([f"--model_name={path}", *FLAGS])
    for cut in [cut for name, cut in found if name == case]:
        figures, grads, order, held_out = found[case, cut]
        zeros = {k: t * ("lora_A" in k) for k, t in lora.items()}  # the reference is the base
        model, named = tiny.reference_model(path, "nf4_dq", zeros, cfg)

        def set_lora(named=named):
            for key, param in named.items():
                param.data = lora[key].clone()

        loss, metrics = by_trl(case, order, model, set_lora, path, tmp_path)
        loss.backward()
        assert figures["loss"] == pytest.approx(loss.item(), rel=1e-5), cut
        assert held_out["loss"] == pytest.approx(loss.item(), rel=1e-5), cut
        largest = max(param.grad.abs().max().item() for param in named.values())
        for key, param in named.items():
            own = torch.from_numpy(grads[key])
            torch.testing.assert_close(own, param.grad, rtol=1e-4, atol=1e-5 * largest, msg=key)
        theirs = {"margin": "rewards/margins", "accuracy": "rewards/accuracies", "kl": "kl"}
        theirs |= {
            f"{k}_{side}": f"{k}/{side}"
            for k in ("rewards", "logps")
            for side in ("chosen", "rejected")
        }
        for own_name, name in theirs.items():
            if own_name in figures and name in metrics and case not in ("orpo", "simpo"):
                wanted = float(np.mean([float(v) for v in metrics[name]]))
                assert figures[own_name] == pytest.approx(wanted, rel=1e-4, abs=1e-5), own_name
        assert {k: v for k, v in held_out.items() if k != "loss"} == pytest.approx(
            {k: v for k, v in figures.items() if k != "loss"}, rel=1e-4, abs=1e-6
        )


def test_a_shared_prompt_gives_what_two_whole_rows_give(seen):
    _, _, found = seen
    for case in ("dpo, sft", "orpo", "ipo"):
        one, other = (found[case, cut] for cut in ("sharded, packed", "packed, shared prompts"))
        assert one[0] == pytest.approx(other[0], rel=2e-6, abs=2e-6)
        largest = max(np.abs(grad).max() for grad in one[1].values())
        for key, grad in one[1].items():
            assert np.abs(grad - other[1][key]).max() <= 2e-6 * max(largest, 1e-2), key


def _shares(world, path: Path) -> bool:
    model, info, cfg = tiny.build(path, world, *FLAGS, "--packing=on", "--objective=dpo")
    batches = PackedBatches(samples("dpo"), 24, sampler_config(cfg, 1, 0, 8))
    said = losses.keep_rows_apart(model, batches, info, world)
    assert bool(said) == batches.shares_prompts
    return batches.shares_prompts


def test_prompts_are_shared_by_models_that_compute_branches_alone(tmp_path):
    """A window may end inside a prompt."""
    for name, sizes in {"qwen3": {"head_dim": 32}, "gemma2": {"head_dim": 32}}.items():
        path = tiny.save_model(tmp_path / name, name, num_hidden_layers=2, **sizes)
        assert run_ranks(_shares, 1, path) == [name == "qwen3"]
