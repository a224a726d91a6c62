"""One run of an arm of a bench: started, watched, read."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed.env import wishes
from fsdp_qlora.errors import DONE
from fsdp_qlora.results.bench import process
from fsdp_qlora.results.bench.arms import Arm, Workload, obstacle


def attempt(
    arm: Arm, work: Workload, out: Path, env: dict[str, str], timeout_s: float
) -> dict[str, Any]:
    """Run an arm once.

    Args:
        arm: the arm.
        work: what it trains.
        out: directory of the run; made here.
        env: from `environment`.
        timeout_s: longest it may take.

    Returns:
        state ("measured" or "failed", then with a reason), command, log, wall_s, host memory, and
        the fields of `Measured`.
    """
    out.mkdir(parents=True)
    record: dict[str, Any] = {"state": "failed", "command": ""}
    reason = obstacle(arm, work)
    if reason is not None:
        return {**record, "reason": reason}
    launch, log = arm.launch(work, out), out / "log.txt"
    milestone = out / arm.milestone if arm.milestone else None
    ran = process.run(launch, env, log, timeout_s, milestone)
    record |= {"command": shlex.join(launch.argv), "log": str(log), "wall_s": ran.wall_s}
    record |= {"host_before_gib": ran.host_before_gib, "host_peak_gib": ran.host_peak_gib}
    record |= {"host_added_gib": ran.host_peak_gib - ran.host_before_gib}
    if ran.code != DONE:
        how = f"no end after {timeout_s:.0f} s" if ran.code is None else f"code {ran.code}"
        return {**record, "reason": f"{how}: {process.last_word(ran.lines)} (log: {log})"}
    try:
        measured = arm.read(work, out, ran)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {**record, "reason": f"its record cannot be read: {error!r} (log: {log})"}
    return {**record, "state": "measured", "reason": None, **asdict(measured)}


def environment(env: Mapping[str, str], p2p: str, num_ranks: int) -> dict[str, str]:
    """Return the environment of every arm: threads and allocator alike, our modules at hand.

    Args:
        env: of this process.
        p2p: setting; "off" disables peer access of NCCL, the others leave it alone.
        num_ranks: processes of an arm.
    """
    paths = [str(PROJECT_DIR), *filter(None, [env.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    ours |= {"NCCL_P2P_DISABLE": "1"} if p2p == "off" else {}
    kept = {name: text for name, text in env.items() if name != "NCCL_P2P_DISABLE"}
    return {**kept, **wishes(env, num_ranks), **ours}
