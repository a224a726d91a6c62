"""What a running training shows: a bar on a terminal, some plain lines elsewhere."""

import math
import os
import sys
from typing import Any

from tqdm import tqdm

MIN_PLAIN_LINES = 20


def build_bar(num_steps: int, has_bar: bool, num_done: int = 0) -> tqdm:
    """A progress bar on the terminal; disabled (plain lines instead) elsewhere.

    Args:
        num_steps: optimizer steps of the run.
        has_bar: False for plain lines on a terminal too.
        num_done: steps that a run which goes on has taken.
    """
    is_live = has_bar and sys.stderr.isatty() and "NO_COLOR" not in os.environ
    form = "{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}"
    rest = {"dynamic_ncols": True, "bar_format": form, "disable": not is_live}
    return tqdm(total=num_steps, initial=num_done, **rest)


def show(bar: tqdm, line: dict[str, Any], num_steps: int, step_s: float) -> None:
    """Move the bar on, or print a line now and then when nobody watches.

    Args:
        bar: of `build_bar`.
        line: of metrics.jsonl.
        num_steps: optimizer steps of the run.
        step_s: seconds of a step, for the time that is left.
    """
    loss = math.nan if line["loss"] is None else line["loss"]
    text = f"loss {loss:.3f} {line['tokens_per_s']:,.0f} tok/s"
    card = max(line["ranks"], key=lambda rank: rank["device_peak_reserved_gib"])
    if card["device_total_gib"]:
        text += f" card {card['device_peak_reserved_gib']:.1f}/{card['device_total_gib']:.0f} GiB"
    text += f" host {line['host']['host_used_gib']:.1f}/{line['host']['host_total_gib']:.0f} GiB"
    if not bar.disable:
        bar.set_postfix_str(text, refresh=False)
        bar.update(1)
        return
    step, every = line["step"], max(1, num_steps // MIN_PLAIN_LINES)
    if step % every == 0 or step in (1, num_steps):
        eta = tqdm.format_interval((num_steps - step) * step_s)
        print(f"step {step}/{num_steps} {text} ETA {eta}", flush=True)
