"""Evaluation within a run: exact, told, the best kept, and no trace of it in the training."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from fsdp_qlora import config
from fsdp_qlora.data.prompts import Prompt
from fsdp_qlora.data.tokens import Sample, of_samples
from fsdp_qlora.training.evaluate import Evaluator
from fsdp_qlora.training.metrics import Resumed
from tests import tiny
from tests.ranks import run_ranks
from tests.training.test_memory_rows import tracked

NUM_STEPS = 6
PROMPTS = (Prompt("ask", (5, 6, 7), "said"), Prompt("other", (9, 8)))


def samples(num, seed):
    """Rows whose second half is learned; one of them has nothing to learn."""
    random = np.random.default_rng(seed)
    rows = [random.integers(3, 90, length) for length in random.integers(4, 24, num)]
    made = [Sample(row.astype(np.int32), np.arange(len(row)) >= len(row) // 2) for row in rows]
    made[-1] = Sample(made[-1].input_ids, np.zeros(len(rows[-1]), bool))
    return of_samples(made, "x")


def build(world, path, *flags):
    own = ("--lora_dropout=0.3", "--lr=0.05", "--eval_samples=9", *flags)
    tracker, trained = tracked(world, path, NUM_STEPS, *own)
    return tracker.plan, tracker, trained


def run(world, path, out, is_evaluated):
    """Losses of all steps; evaluated every second step, and its own findings."""
    from transformers import AutoTokenizer

    from fsdp_qlora import inference
    from fsdp_qlora.data.batches import Batches, SamplerConfig
    from fsdp_qlora.export import model_files
    from fsdp_qlora.training import loop, metrics

    flags = ("--eval_every=2", "--sample_tokens=5") if is_evaluated else ()
    plan, tracker, trained = build(world, path, f"--output_dir={out}", *flags)
    train = Batches(samples(40, 0), SamplerConfig(2, 1, world.size, world.rank, 42, 1, NUM_STEPS))
    rest = tiny.held_out(samples(9, 1), 2, world.size, world.rank)
    tokenizer = AutoTokenizer.from_pretrained(path)
    data = SimpleNamespace(train=train, held_out=rest, tokenizer=tokenizer, prompts=PROMPTS)
    if is_evaluated and world.rank == 0:
        out.mkdir()
        config.save(plan.cfg, out / "run_config.json", {})
    with metrics.Recorder(tracker, world, NUM_STEPS, {}) as recorder:
        evaluator = Evaluator(
            trained,
            data,
            plan.cfg,
            lambda prompt: inference.answer(trained.model, tokenizer, prompt.ids, 5, world),
            lambda cfg: model_files.save(trained.model, plan.info, cfg, tokenizer, world.rank == 0),
            recorder,
        )
        if not is_evaluated:
            loop.fit(trained, train, recorder, tiny.unsaved())
            return {}
        evaluator.begin()
        loop.fit(trained, train, recorder, tiny.unsaved(), evaluator.after_step)
        evaluator.end()
    return {"losses": evaluator.losses, "best": evaluator.best, "answers": evaluator.answers}


def _compare(world, path, out):
    """Without and with evaluation; then the same rows in other batches."""
    from fsdp_qlora.training import evaluate

    run(world, path, out / "without", is_evaluated=False)
    found = run(world, path, out / "with", is_evaluated=True)
    found["cuts"] = _cuts(world, path)
    _, _, trained = build(world, path)
    nothing = of_samples([Sample(np.arange(3, 9, dtype=np.int32), np.zeros(6, bool))] * 3, "x")
    batches = tiny.held_out(nothing, 2, world.size, world.rank)
    found["nothing"] = evaluate.measure(trained.model, None, batches, world)["loss"]
    return found


def _cuts(world, path):
    """Held-out loss of one adapter, by batch size."""
    from fsdp_qlora.training import evaluate

    _, _, trained = build(world, path, "--precision=fp32")
    tiny.fill_lora(trained.model)
    cuts = [tiny.held_out(samples(9, 1), size, world.size, world.rank) for size in (1, 2, 4, 16)]
    return [evaluate.measure(trained.model, None, batches, world)["loss"] for batches in cuts]


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    place = tmp_path_factory.mktemp("evaluate")
    path = tiny.save_model(place / "model", vocab_size=384)
    tiny.save_tokenizer(path, ["say la", "it is lo"])
    found = run_ranks(_compare, 2, path, place)
    (alone,) = run_ranks(_cuts, 1, path)
    return place, found, alone


def test_training_is_the_same_bit_for_bit_with_and_without_evaluation(looked):
    """With dropout: evaluations and answers must not draw from its generator."""
    steps = [
        [(line["loss"], line["grad_norm"]) for line in tiny.steps(looked[0] / name)]
        for name in ("without", "with")
    ]
    assert len(steps[0]) == NUM_STEPS and steps[0] == steps[1]


def test_held_out_loss_is_the_same_however_rows_are_cut_and_ranks_share_them(looked):
    """Reference: one rank, one row at a time."""
    _, found, alone = looked
    assert alone[0] > 0
    for loss in (*alone, *found[0]["cuts"], *found[1]["cuts"]):
        assert loss == pytest.approx(alone[0], rel=1e-6)
    assert found[0]["nothing"] == 0.0  # nothing to learn in any row is no NaN


def test_every_second_step_is_evaluated_and_the_best_adapter_is_kept(looked):
    """Before, after steps 2 and 4, and after the last."""
    place, found, _ = looked
    losses, best = found[0]["losses"], found[0]["best"]
    assert list(losses) == [0, 2, 4, 6] and found[1]["losses"] == losses
    events = [line for line in tiny.lines(place / "with") if line.get("event") == "eval"]
    assert [(e["when"], e["step"], e["loss"]) for e in events] == [
        (when, step, losses[step])
        for when, step in (("before", 0), ("step", 2), ("step", 4), ("after", 6))
    ]
    assert all(e["perplexity"] == pytest.approx(math.exp(e["loss"])) for e in events)
    assert best == min((losses[step], step) for step in (2, 4, 6))
    kept = json.loads((place / "with" / "best" / "evaluation.json").read_text())
    assert (kept["loss"], kept["step"]) == best
    assert best[0] < losses[0]


def _reload(world, path):
    from fsdp_qlora.model import adapters
    from fsdp_qlora.training import evaluate

    *_, trained = build(world, path.parent / "model")
    file = path / "best" / "adapter_model.safetensors"
    adapters.load(trained.model, file)
    rows = tiny.held_out(samples(9, 1), 2, world.size, world.rank)
    return evaluate.measure(trained.model, None, rows, world)["loss"]


def test_the_kept_adapter_has_the_loss_it_was_kept_for(looked):
    (loss,) = run_ranks(_reload, 1, looked[0] / "with")
    assert loss == pytest.approx(looked[1][0]["best"][0], rel=1e-3)


def test_all_prompts_are_answered_before_and_after_the_same_on_every_rank(looked):
    place, found, _ = looked
    assert found[0]["answers"] == found[1]["answers"]
    events = [line for line in tiny.lines(place / "with") if line.get("event") == "sample"]
    assert [(e["when"], e["prompt"], e["expected"]) for e in events] == [
        (when, prompt.shown, prompt.expected) for when in ("before", "after") for prompt in PROMPTS
    ]
    assert [e["answer"] for e in events] == [*found[0]["answers"][0], *found[0]["answers"][6]]


def test_a_run_that_goes_on_knows_what_was_seen_before(looked):
    """From its record: nothing is evaluated a second time."""
    place, found, _ = looked
    cfg = config.parse(["--model_name", "x", "--eval_every=2", f"--output_dir={place / 'with'}"])
    record = (place / "with" / "metrics.jsonl").read_text().splitlines()
    resumed = SimpleNamespace(resumed=Resumed(list(map(json.loads, record))))
    alone = SimpleNamespace(world=SimpleNamespace(gather_objects=lambda value: [value]))
    later = Evaluator(alone, None, cfg, None, None, resumed, num_done=4)
    later.begin()
    assert later.losses == found[0]["losses"]
    assert later.answers == {0: found[0]["answers"][0]}
    assert later.best == found[0]["best"]
