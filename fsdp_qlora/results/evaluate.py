"""The verb `evaluate`: held-out loss and perplexity of a base, with and without its adapter."""

import argparse
import json
import math
from pathlib import Path

from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.results import reopen


def main(argv: list[str]) -> int:
    """Print, and write beside the adapter, what the adapter does on held-out rows."""
    parser = argparse.ArgumentParser(
        prog="python -m fsdp_qlora evaluate",
        description="Loss and perplexity on held-out rows, before and after the adapter; the rows "
        "are those of the run, or what flags of train.py (--dataset, --eval_samples, ...) say.",
    )
    parser.add_argument("--adapter", type=Path, required=True, help="directory")
    args, flags = parser.parse_known_args(argv)
    opened = reopen.open_run(args.adapter, flags)
    from fsdp_qlora import data
    from fsdp_qlora.train import loop

    rows = data.build(opened.cfg, opened.info, opened.world).held_out
    if not rows:
        raise UserError(
            f"{opened.cfg.dataset}",
            "holds no rows out",
            "say --eval_samples N, --eval_split 0.1 or a file",
        )
    found = {}
    for name in ("base", "adapter"):
        loss = loop.evaluate(opened.model, rows, opened.world)
        found[name] = {"loss": loss, "perplexity": math.exp(loss)}
        print(f"{name:<8} loss {loss:.4f}, perplexity {math.exp(loss):.3f}", flush=True)
        opened.load_adapter()
    num_tokens = sum(batch.num_trained_tokens for batch in rows)
    path = args.adapter / "evaluation.json"
    path.write_text(json.dumps({**found, "num_tokens": num_tokens}, indent=2) + "\n")
    print(f"{num_tokens:,} tokens; {path}")
    return DONE
