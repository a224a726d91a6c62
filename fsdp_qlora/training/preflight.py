"""What is checked before a rank is started: libraries, GPUs, tokenizer, all rows, room on the disk.

Nothing here imports torch, so that the user knows within a second or two, and no directory has
been made by then.
"""

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator

from fsdp_qlora.arch import ModelInfo, trained
from fsdp_qlora.atomic import IS_FULL
from fsdp_qlora.checkpoint_store import last_step, steps
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig, check_optimizer
from fsdp_qlora.errors import ENVIRONMENT, RUN_FAILED, UserError
from fsdp_qlora.hardware import GIB
from fsdp_qlora.planning.memory import moment_bytes
from fsdp_qlora.planning.run import RunPlan
from fsdp_qlora.planning.sizes import DTYPE_BYTES

ALWAYS = ("torch", "transformers", "datasets", "safetensors", "tokenizers", "tqdm")
FULL_TEXT = re.compile(rf"os error ({'|'.join(map(str, sorted(IS_FULL)))})")  # as Rust says it
BASES = {"bnb": "bitsandbytes", "hqq": "hqq", "none": "torch"}


def check(plan: RunPlan) -> None:
    """Check all that a run needs besides its model, which has been read.

    Rows are read and tokenized here, into the cache of tokens where it is in use, so that the
    ranks find them there. Functions of the user's own, and files too large to be tokenized twice
    where nothing is kept, are left to the ranks.

    Args:
        plan: of the run.

    Raises:
        UserError: a library is not installed, or a GPU is too old (code 3); no such data, a bad
            row, no usable tokenizer, nothing left to train on.
    """
    check_optimizer(plan.cfg.optimizer, bool(plan.machine.gpus))
    _check_libraries(plan.cfg)
    _check_gpus(plan)
    _check_data(plan.cfg, plan.info)


def _check_libraries(cfg: TrainConfig) -> None:
    flash = "flash_attn" if cfg.attn == "flash_attention_2" else "torch"
    for name in (*ALWAYS, BASES[TRAIN_TYPES[cfg.train_type].base], flash):
        if importlib.util.find_spec(name) is None:
            got = f"--train_type {cfg.train_type} --attn {cfg.attn}"
            remedy = f"pip install {name.replace('_', '-')}"
            raise UserError(got, f"needs {name}, which is not installed", remedy, ENVIRONMENT)
    for name in cfg.trackers:
        if importlib.util.find_spec(name) is None:
            remedy = f"pip install {name.replace('_', '-')}"
            raise UserError(f"--log_to {name}", "is not installed", remedy, ENVIRONMENT)


def _check_gpus(plan: RunPlan) -> None:
    """A GPU without bf16 computes it all the same, many times slower: torch does not say so."""
    lacking = [gpu.name for gpu in plan.machine.gpus if not gpu.has_bf16]
    if lacking and plan.cfg.compute_dtype == "bfloat16":
        got = f"--precision {plan.cfg.precision} on a {lacking[0]}"
        remedy = "leave --precision out, or use fp16_autocast"
        raise UserError(got, "it has no bfloat16", remedy, ENVIRONMENT)


def _check_data(cfg: TrainConfig, info: ModelInfo) -> None:
    from fsdp_qlora.data import prepare, sources, tokenizer

    if cfg.dataset == sources.DUMMY and not prepare.has_prompts(cfg):
        return
    path = tokenizer.directory(info)
    if not (path / "tokenizer.json").exists():
        return  # transformers makes a fast one of it, in the ranks
    light = tokenizer.read(path)
    names = [name for name in (cfg.dataset, cfg.eval_split) if name is not None]
    own = [name for name in names if any(map(sources.OWN_CODE.fullmatch, name.split(",")))]
    for name in own:
        sources.find(name, cfg)
    if own:
        return
    ready = prepare.prepare_early(cfg, light, info.vocab_size)
    if ready is not None:
        ready.check()
        prepare.choose_prompts(cfg, ready, light)


def check_room(cfg: TrainConfig, info: ModelInfo) -> None:
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
def explain_disk_full(cfg: TrainConfig) -> Iterator[None]:
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
