"""Checkpoints in a run: any number of ranks, a full disk, the best one, minutes (checkpoint.py)."""

import contextlib
import io
import json
import math
import os
from pathlib import Path

import pytest

from fsdp_qlora.errors import INPUT, UserError
from tests import faults, tiny
from tests.ranks import run_ranks
from tests.training.test_resume import COMMON, make_place, run

# The rates are constant, since they follow from the number of steps, which grows here.
FLAGS = (*COMMON, "--precision=fp32", "--lora_dropout=0", "--lora_target_modules=q_proj")
FLAGS += ("--lr_scheduler=constant",)
NUM_STEPS = 8
# Ranks, rows of each in a step, steps in all: the global batch stays 6.
LEGS = ((2, 3, 2), (3, 2, 4), (1, 6, 6), (2, 3, NUM_STEPS))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("checkpoint"))


def _leg(world, place: Path, out: Path, *flags: str) -> int:
    """One part of a run; what a resume is refused with, or 0."""
    try:
        run(world, place, out, *FLAGS, *flags)
    except UserError as error:
        assert "global_batch" in str(error)
        return error.code
    return 0


def test_a_run_goes_on_with_more_and_with_fewer_ranks(place: Path):
    """2, 3, 1 and 2 ranks (of 3 each keeps padding): the steps of 2 ranks throughout, to rounding.

    Source of the bound: sums over rows in another order, float32.
    """
    out, whole = place / "worlds", place / "world2"
    for i, (num_ranks, batch_size, num_steps) in enumerate(LEGS):
        more = ["--resume=latest"] if i else []
        flags = (f"--batch_size={batch_size}", f"--max_steps={num_steps}", *more)
        codes = run_ranks(_leg, num_ranks, place, out, *flags)
        assert codes == [0] * num_ranks
    run_ranks(_leg, 2, place, whole, "--batch_size=3")
    found, expected = tiny.steps(out), tiny.steps(whole)
    assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
    assert [len(line["ranks"]) for line in found] == [2, 2, 3, 3, 1, 1, 2, 2]
    for mine, other in zip(found, expected, strict=True):
        assert mine["num_trained_tokens"] == other["num_trained_tokens"]
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4), (mine["step"], name)
    assert run_ranks(_leg, 1, place, out, "--batch_size=3", "--resume=latest") == [INPUT]
    from fsdp_qlora.report import page

    page.write([out], out)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_steps"] == NUM_STEPS and len(summary["peaks"]["ranks"]) == 3


def _with_fault(world, place: Path, out: Path, fault: str, *flags: str) -> str:
    os.environ["FSDP_QLORA_FAULT"] = fault
    faults.install()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(world, place, out, *FLAGS, *flags)
    return said.getvalue()


def test_a_full_disk_costs_a_checkpoint_but_no_step(place: Path):
    """One line; the one before is there, the next ones are written, nothing half-done stays."""
    out = place / "full"
    fault = "enospc:0:save-after-file:3"
    said, _ = run_ranks(_with_fault, 2, place, out, fault, "--max_steps=5")
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-1", "step-2", "step-4", "step-5"]
    assert [line["step"] for line in tiny.steps(out)] == [1, 2, 3, 4, 5]
    (line,) = [line for line in said.splitlines() if line.startswith("warning")]
    assert "step 3 could not be written (No space left on device)" in line
    assert "the last one there: of step 2" in line


def _looked_at(world, place: Path, out: Path) -> None:
    """A run whose third step is its best."""
    flags = ("--eval_samples=4", "--eval_every=1", "--lr=3", "--keep_checkpoints=1")
    flags += ("--recipe=reference",)
    run(world, place, out, *FLAGS, *flags, "--save_every=3", "--max_steps=6")


def test_the_checkpoint_of_the_best_evaluation_stays(place: Path):
    """And is written when the evaluation tells, whatever --save_every says."""
    out = place / "best"
    run_ranks(_looked_at, 2, place, out)
    losses = {e["step"]: e["loss"] for e in tiny.lines(out) if e.get("event") == "eval"}
    losses.pop(0)
    best = min(losses, key=lambda step: losses[step])
    marked = json.loads((out / "checkpoints" / "best.json").read_text())
    assert marked == {"step": best, "loss": losses[best]}
    names = {path.name for path in (out / "checkpoints").iterdir()}
    assert names == {"best.json", f"step-{best}", "step-6"} and best != 6


def test_periods_are_steps_or_minutes():
    from fsdp_qlora.training.checkpoint import period

    assert period("50") == (50, math.inf) and period("30m") == (0, 1800.0)
    assert period("0") == period("0m") == (0, math.inf)
