"""The verb `evaluate`: held-out loss, and tasks of lm-eval, of a base with and without adapter."""

import argparse
from pathlib import Path
from typing import Any

from fsdp_qlora import atomic, config
from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.results import reopen, tasks

NAMES = ("base", "adapter")


def main(argv: list[str]) -> int:
    """Print, and write beside the adapter, what the adapter does on held-out rows and tasks."""
    parser = argparse.ArgumentParser(
        prog="python -m fsdp_qlora evaluate",
        description="Loss and perplexity on held-out rows, before and after the adapter; the rows "
        "are those of the run, or what flags of train.py (--dataset, --eval_samples, ...) say. "
        "With --tasks those of lm-eval instead (pip install lm-eval).",
    )
    parser.add_argument("--adapter", type=Path, required=True, help="directory")
    parser.add_argument("--tasks", help="names of lm-eval's tasks: a,comma,list")
    parser.add_argument("--task_dir", type=Path, help="directory with tasks of your own")
    parser.add_argument("--limit", type=int, help="rows of each task [all]")
    args, flags = parser.parse_known_args(argv)
    if args.tasks is not None:
        tasks.require()
    cfg = reopen.config_of(args.adapter, flags)
    if args.tasks is None:
        config.check_own_code(vars(cfg), config.given(flags), args.adapter)
    if reopen.is_parent(cfg):
        return reopen.spread("evaluate", argv, cfg)
    opened = reopen.open_run(args.adapter, cfg)
    path = args.adapter / "evaluation.json"
    if args.tasks is not None:
        found, path = _tasks(opened, args), args.adapter / "tasks.json"
    else:
        found = _held_out(opened)
    if opened.is_writer:
        atomic.write_json(path, found)
        print(path)
    return DONE


def _held_out(opened: reopen.Opened) -> dict[str, Any]:
    """Loss and perplexity over all held-out rows of all ranks."""
    from fsdp_qlora import data
    from fsdp_qlora.results.look import perplexity
    from fsdp_qlora.training import loop

    rows = data.build(opened.cfg, opened.info, opened.world).held_out
    if not rows:
        remedy = "say --eval_samples N, --eval_split 0.1 or a file"
        raise UserError(f"{opened.cfg.dataset}", "holds no rows out", remedy)
    found: dict[str, Any] = {}
    for name in NAMES:
        loss = loop.evaluate(opened.model, rows, opened.world)
        found[name] = {"loss": loss, "perplexity": perplexity(loss)}
        if opened.is_writer:
            print(f"{name:<8} loss {loss:.4f}, perplexity {perplexity(loss):.3f}", flush=True)
        opened.load_adapter()
    num_tokens = opened.world.sum(sum(batch.num_trained_tokens for batch in rows))
    return {**found, "num_tokens": round(num_tokens)}


def _tasks(opened: reopen.Opened, args: argparse.Namespace) -> dict[str, Any]:
    """What lm-eval measures, by task."""
    from fsdp_qlora import data

    tokenizer = data.load_tokenizer(opened.info)
    found: dict[str, Any] = {}
    for name in NAMES:
        found[name] = tasks.run(opened, tokenizer, args.tasks.split(","), args.task_dir, args.limit)
        for line in tasks.lines(name, found[name]) if opened.is_writer else ():
            print(line, flush=True)
        opened.load_adapter()
    return found
