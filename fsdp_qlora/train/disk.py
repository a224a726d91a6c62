"""Room on the disk of a run: enough at the start, one clear line when it ends; no torch."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator

from fsdp_qlora.arch import ModelInfo, trained
from fsdp_qlora.checkpoint_store import last_step, steps
from fsdp_qlora.config import Config
from fsdp_qlora.errors import ENVIRONMENT, RUN_FAILED, UserError
from fsdp_qlora.planning.limits import GIB
from fsdp_qlora.planning.memory import moment_bytes
from fsdp_qlora.planning.sizes import DTYPE_BYTES

IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_TEXT = re.compile(rf"os error ({'|'.join(map(str, sorted(IS_FULL)))})")  # as Rust says it


def check_room(cfg: Config, info: ModelInfo) -> None:
    """Refuse a disk that cannot take the checkpoints and the result, before any work is done.

    Args:
        cfg: the run.
        info: the model.

    Raises:
        UserError: there is not enough room (code 3).
    """
    num_params, place = trained.count(info, cfg), cfg.resolved_output_dir.absolute()
    num_left = cfg.keep_checkpoints + 2 - (len(steps(place)) if cfg.resume else 0)  # best, new one
    weight_bytes = DTYPE_BYTES[cfg.master_dtype]
    num_checkpoints = cfg.saves_checkpoints * max(num_left, 1)
    need_bytes = num_params * (
        num_checkpoints * (weight_bytes + moment_bytes(cfg)) + cfg.save_model * weight_bytes
    )
    while not os.path.exists(place):  # unlike pathlib's it bears names that are too long
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < need_bytes:
        rule = f"needs {need_bytes / GIB:,.2f} GiB for checkpoints and the result"
        rule += f", and {free_bytes / GIB:,.2f} are free"
        remedy = "make room, give another, or --keep_checkpoints 1"
        raise UserError(f"--output_dir {cfg.resolved_output_dir}", rule, remedy, ENVIRONMENT)


@contextlib.contextmanager
def explain_disk_full(cfg: Config) -> Iterator[None]:
    """Say in one line that the disk is full, and how to go on.

    Args:
        cfg: the run.

    Raises:
        UserError: the disk did not take something (code 4).
    """
    try:
        yield
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in IS_FULL
        if not is_full and not FULL_TEXT.search(str(error)):
            raise
        saved = last_step(cfg.resolved_output_dir)
        rest = f"then --resume {cfg.resolved_output_dir} goes on"
        what = f"is full; what was trained is saved up to step {saved}" if saved else "is full"
        raise UserError(
            f"the disk of {cfg.resolved_output_dir}",
            what,
            f"make room, {rest if saved else 'then start again'}",
            RUN_FAILED,
        ) from error
