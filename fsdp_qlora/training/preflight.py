"""What is settled before a rank is started: what --resume stands for, and whether all is there.

Which checkpoint, with which options, and whether it is the same run; libraries, GPUs, tokenizer,
all rows, room on the disk. Nothing here imports torch, so that the user knows within a second or
two, and no directory has been made by then.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsdp_qlora import checkpoint_store, cli, config, errors, hardware, record
from fsdp_qlora.arch import ModelInfo, targets
from fsdp_qlora.atomic import GIB, IS_FULL, read_json
from fsdp_qlora.checkpoint_store import AUTO, LATEST, MANIFEST, STATE, SavedCheckpoint
from fsdp_qlora.config import TRAIN_TYPES, TrainConfig
from fsdp_qlora.errors import ENVIRONMENT, INTEGRITY, RUN_FAILED, UserError, one_line, resume_of
from fsdp_qlora.planning import fit, memory, run, sizes

if TYPE_CHECKING:
    import torch

    from fsdp_qlora.data import Data

STATE_TYPES = {"config": dict, "given": list, "fingerprint": dict}  # what is read of it here
TABLE = errors.read_table(__file__)
TOKENIZER_FILES, MAX_CHARS = ("tokenizer.json", "tokenizer.model"), 40
MAY_CHANGE = (*TABLE["data"], *TABLE["rows"])
Say = Callable[[str], Any]
OnFirst = Callable[[Callable[[], Any]], Any]
FULL_TEXT = re.compile(rf"os error ({'|'.join(map(str, sorted(IS_FULL)))})")  # as Rust says it


def spell_out(argv: Sequence[str]) -> list[str]:
    """Return a command line in which --resume has a value: a bare one means the latest."""
    words = list(argv)
    for i, word in enumerate(words):
        if word == "--resume" and (i + 1 == len(words) or words[i + 1].startswith("--")):
            words[i] = f"--resume={LATEST}"
    return words


def expand_resume(
    argv: Sequence[str], notify: Say = str, on_first: OnFirst = lambda work: work()
) -> tuple[list[str], SavedCheckpoint | None]:
    """Replace --resume, of a command line or its recipe, by all that it stands for.

    What stands in neither of them is as the checkpoint has it, never a default of today.

    Args:
        argv: arguments without the program's name.
        notify: is told what is passed over.
        on_first: does work on rank 0 for all, which chooses the checkpoint and reads it.

    Returns:
        A whole command line, with the checkpoint's own directory behind --resume and the run's
        behind --output_dir; and the checkpoint. Without --resume, or with `auto` where there is no
        checkpoint: `argv`, None.

    Raises:
        UserError: there is no such checkpoint, or it is damaged (code 5); there is no such
            directory, or its rows come from Python that this command line does not name (code 2).
    """
    words = spell_out(argv)
    given = cli.Reader(TrainConfig, config.ALIASES, config.RECIPES_DIR).read_texts(words)
    texts = {name: given[name].text for name in ("resume", "output_dir") if name in given}
    saved = on_first(functools.partial(_find, texts.get("resume"), texts.get("output_dir"), notify))
    if saved is None:
        return words, None
    stored, removed = config.from_record(saved.state["config"])
    config.check_own_code(vars(stored), given, saved.path)
    if removed:
        notify(f"resume    options that are no more, and were set: {', '.join(removed)}")
    fixed = {*saved.state["given"], *TABLE["pinned"]}
    left_open = {"resume", "output_dir", "overwrite", *config.given(words)}
    if stored.fit != "off":
        left_open |= (fit.PLACING | fit.KEEPING) - fixed  # the plan chooses anew
    below = [  # lr_warmup_steps: --profile takes no --warmup_steps of the stored run
        f"--{'lr_' * (name == 'warmup_steps')}{name}={cli.to_text(value)}"
        for name, value in vars(stored).items()
        if name not in left_open and (name in fixed or value != getattr(TrainConfig(), name))
    ]
    return [*below, *words, f"--output_dir={saved.run_dir}", f"--resume={saved.path}"], saved


def _find(wanted: str | None, output_dir: str | None, notify: Say) -> SavedCheckpoint | None:
    """The checkpoint that --resume means; None: there is none at all, and `auto` does not mind."""
    if wanted is None or wanted.lower() in ("none", "null"):
        return None
    if wanted in (LATEST, AUTO) and output_dir is None:
        remedy = "give --output_dir of the run too, or --resume DIR"
        raise UserError("--resume", "does not say which run shall go on", remedy)
    place = Path(str(output_dir) if wanted in (LATEST, AUTO) else wanted).absolute()
    if os.path.exists(place / MANIFEST) or checkpoint_store.STEP_NAME.fullmatch(place.name):
        saved: SavedCheckpoint | None = checkpoint_store.read(place)
    else:
        saved = checkpoint_store.latest(place, notify)
    if saved is not None:
        if output_dir is not None and Path(output_dir).resolve() != saved.run_dir.resolve():
            got, rule = f"--output_dir {output_dir}", f"is not where {wanted} was made"
            raise UserError(got, rule, "leave it out: the run goes on there")
        return _checked(saved)
    number = len(checkpoint_store.steps(place))
    if not place.is_dir() and wanted not in (LATEST, AUTO):
        raise UserError(f"--resume {place}", "no such directory", "give that of a run")
    rule, remedy = "holds no whole checkpoint", "start anew without --resume"
    if number:
        rule += f" ({number} damaged)"
        remedy = "repair one, give another --output_dir, or remove them: --overwrite, no --resume"
    if number or wanted != AUTO:
        raise UserError(f"--resume {place}", rule, remedy, INTEGRITY)
    notify(f"resume    no whole checkpoint in {place}: a fresh start")
    return None


def _checked(saved: SavedCheckpoint) -> SavedCheckpoint:
    """A checkpoint that was written by a trainer like this one."""
    state = saved.state
    record.check_format(state, str(saved.path / STATE))
    wrong = [name for name, kind in STATE_TYPES.items() if not isinstance(state.get(name), kind)]
    wrong += [] if wrong or all(isinstance(n, str) for n in state["given"]) else ["given"]
    wrong += ["version"] if state["version"] != checkpoint_store.VERSION else []
    if wrong:
        rule = f"is not what this version of the trainer writes ({', '.join(wrong)})"
        remedy = "go on with the version that wrote it"
        raise UserError(str(saved.path / STATE), rule, remedy, INTEGRITY)
    if not saved.is_finite:
        run_dir, steps = saved.run_dir, checkpoint_store.steps(saved.run_dir)
        places = [checkpoint_store.step_dir(run_dir, step) for step in steps]
        good = [resume_of(p) for p in places if read_json(p / STATE).get("is_finite")]
        remedy = f"a lower --lr and {good[0]}" if good else "start anew with a lower --lr"
        rule = "holds weights that are NaN or infinite: no step leads out of that"
        raise UserError(str(saved.path), rule, remedy, INTEGRITY)
    return saved


def saved_of(cfg: TrainConfig) -> SavedCheckpoint | None:
    """The checkpoint that a rank resumes; its bytes were checked when it was chosen.

    Args:
        cfg: resume, as `expand_resume` leaves it; `auto` means that there was none.
    """
    if cfg.resume in (None, AUTO):
        return None
    path = Path(str(cfg.resume))
    state = json.loads((path / STATE).read_bytes())
    return SavedCheckpoint(path, int(state["step"]), state)


def is_done(saved: SavedCheckpoint, cfg: TrainConfig) -> bool:
    """Whether a run has come to its end, at a checkpoint, and is asked for no more than that.

    Args:
        saved: the checkpoint; after an earlier one than the last the run goes on.
        cfg: the run as it shall go on.
    """
    stored = saved.state.get("config", {})
    is_same = all(stored.get(name) == getattr(cfg, name) for name in ("max_steps", "num_epochs"))
    is_over = is_same and checkpoint_store.is_complete(saved.run_dir)
    return is_over and checkpoint_store.latest(saved.run_dir) in (saved, None)


def facts(cfg: TrainConfig, device: "torch.device") -> dict[str, Any]:
    """What all ranks of a run must have in common before model and data are known.

    Args:
        cfg: the run.
        device: of this rank.

    Returns:
        Plain values by name: options, versions, a digest of the sources of this program.
    """
    files = sorted(config.PROJECT_DIR.glob(f"{config.PACKAGE}/**/*.*"))
    sources = [path.read_bytes() for path in files if path.suffix in (".py", ".toml")]
    product = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    libraries = {f"version of {name}": v for name, v in hardware.versions(device).items()}
    every = {f"--{name}": value for name, value in vars(cfg).items()} | libraries
    every["fsdp_qlora"] = product
    return {name: value for name, value in every.items() if name not in TABLE["may_differ"]}


def fingerprint(
    cfg: TrainConfig, info: ModelInfo, base: str | None, num_ranks: int
) -> dict[str, Any]:
    """What a checkpoint belongs to, as far as it is known before data and model are loaded.

    Args:
        cfg: the run.
        info: the model.
        base: digest of its files; None for a shape without files.
        num_ranks: of the run.

    Returns:
        Plain values by name, as JSON has them.
    """
    per_step = cfg.batch_size * cfg.gradient_accumulation_steps * num_ranks
    layers = [[row.linear.name for row in layer] for layer in targets.find_targets(info, cfg)]
    are_alike = all(layer == layers[0] for layer in layers)
    numbered = [f"{index}.{name}" for index, layer in enumerate(layers) for name in layer]
    values: dict[str, Any] = {
        "base": base or _digest(repr(sorted(info.config.items()))),
        **({"base_samples": info.digest()} if base else {}),
        "format": cfg.format_name,
        "adapter": TRAIN_TYPES[cfg.train_type].adapter,
        "targets": sorted(layers[0]) if are_alike else numbered,
        "compute_dtype": cfg.compute_dtype,
        "global_batch": per_step // cfg.context_parallel,
        "tokenizer": _tokenizer(info.path),
    }
    return values | {name: getattr(cfg, name) for name in (*TABLE["model"], *TABLE["data"])}


def data_fingerprint(data: "Data") -> dict[str, Any]:
    """What the rows became.

    Args:
        data: of the run.

    Returns:
        Plain values by name: the chat template, how many rows, and a hash over the tokens of all in
        their order (that of each is kept with it).
    """
    samples = data.train.samples
    return {
        "chat_template": _digest(str(getattr(data.tokenizer, "chat_template", None))),
        "rows": len(samples),
        "tokens": hashlib.sha256(samples.hashes.tobytes()).hexdigest()[:16],
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _tokenizer(path: Path | None) -> str | None:
    for file in (path / name for name in TOKENIZER_FILES) if path is not None else ():
        if file.is_file():
            return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return None


def check_same(
    saved: Mapping[str, Any], current: Mapping[str, Any], allow_data_change: bool
) -> list[str]:
    """Refuse to go on with another base, adapter or data than the checkpoint belongs to.

    Args:
        saved, current: fingerprints; what only one of them has is not compared.
        allow_data_change: data, seed and batch may differ.

    Returns:
        A line for each difference that is allowed.

    Raises:
        UserError: something differs (code 2); its notes are a table.
    """
    other = [name for name in saved if name in current and saved[name] != current[name]]
    table = [_row(name, saved[name], current[name]) for name in other]
    refused = [name for name in other if not allow_data_change or name not in MAY_CHANGE]
    if not refused:
        return [f"resume    {row}" for row in table]
    only_data = all(name in MAY_CHANGE for name in refused)
    remedy = "--allow_data_change goes on with other data" if only_data else "start a new run"
    got = f"--resume with another {', '.join(refused)}"
    error = UserError(got, "the checkpoint belongs to what was", remedy)
    error.__notes__ = [_row("", "checkpoint", "this run"), *table]
    raise error


def library_notes(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """A line for each library whose version is not that of the checkpoint.

    Args:
        saved, current: name -> version.
    """
    both = [name for name in saved if name in current and saved[name] != current[name]]
    return [f"warning   {name} was {saved[name]}, now {current[name]}" for name in both]


def _row(name: str, before: Any, after: Any) -> str:
    texts = [one_line(",".join(v) if isinstance(v, list) else str(v)) for v in (before, after)]
    old, new = (errors.cut(text, MAX_CHARS) for text in texts)
    return f"{name:<16}{old:<{MAX_CHARS}}  {new}".rstrip()


def check(plan: run.RunPlan, saved: SavedCheckpoint | None = None, base: str | None = None) -> None:
    """Check all that a run needs besides its model, which has been read.

    Rows are read and tokenized here, into the cache of tokens where it is in use, so that the
    ranks find them there. Functions of the user's own, and files too large to be tokenized twice
    where nothing is kept, are left to the ranks.

    Args:
        plan: of the run.
        saved: what is resumed; None: nothing.
        base: digest of the model's files.

    Raises:
        UserError: a library is not installed, a GPU is too old, or the disk has no room (code 3);
            no such data, a bad row, no usable tokenizer, nothing left to train on; what is resumed
            is another run.
    """
    if saved is not None:
        current = fingerprint(plan.cfg, plan.info, base, plan.machine.num_ranks)
        check_same(saved.state["fingerprint"], current, plan.cfg.allow_data_change)
    check_room(plan.cfg, plan.info)
    config.check_optimizer(plan.cfg.optimizer, bool(plan.machine.gpus))
    _check_libraries(plan.cfg)
    _check_gpus(plan)
    _check_data(plan.cfg, plan.info)
    hardware.release_freed_memory()  # this process lives as long as the ranks


def _check_libraries(cfg: TrainConfig) -> None:
    flash = "flash_attn" if cfg.attn == "flash_attention_2" else "torch"
    kind, needs = f"--train_type {cfg.train_type} --attn {cfg.attn}", TABLE["needs"]
    needed = dict.fromkeys((*needs["always"], needs[TRAIN_TYPES[cfg.train_type].base], flash), kind)
    for name, got in (needed | {name: f"--log_to {name}" for name in cfg.trackers}).items():
        if importlib.util.find_spec(name) is None:
            remedy = f"pip install {name.replace('_', '-')}"
            raise UserError(got, f"needs {name}, which is not installed", remedy, ENVIRONMENT)


def _check_gpus(plan: run.RunPlan) -> None:
    """A GPU without bf16 computes it all the same, many times slower: torch does not say so."""
    lacking = [gpu.name for gpu in plan.machine.gpus if not gpu.has_bf16]
    if lacking and plan.cfg.compute_dtype == "bfloat16":
        got = f"--precision {plan.cfg.precision} on a {lacking[0]}"
        remedy = "leave --precision out, or use fp16_autocast"
        raise UserError(got, "it has no bfloat16", remedy, ENVIRONMENT)


def _check_data(cfg: TrainConfig, info: ModelInfo) -> None:
    from fsdp_qlora.data import prepare, prompts, sources, tokenizer

    if cfg.dataset == sources.DUMMY and not prompts.has_prompts(cfg):
        return
    path = tokenizer.directory(info)
    if not (path / "tokenizer.json").exists():
        return  # transformers makes a fast one of it, in the ranks
    light = tokenizer.read(path)
    names = [name for name in (cfg.dataset, cfg.eval_split) if name is not None]
    own = [name for name in names if any(map(sources.OWN_CODE.fullmatch, name.split(",")))]
    for name in own:
        sources.find(name, cfg, None)
    if own:
        return
    ready = prepare.prepare_early(cfg, light, info.vocab_size)
    if ready is not None:
        ready.check()
        prompts.choose_prompts(cfg, ready, light)


def check_room(cfg: TrainConfig, info: ModelInfo) -> None:
    """Refuse a disk that cannot take the checkpoints and the result, before any work is done.

    Args:
        cfg: the run.
        info: the model.

    Raises:
        UserError: there is not enough room (code 3).
    """
    num_params, place = sizes.count_trained(info, cfg).total, cfg.resolved_output_dir.absolute()
    num_there = len(checkpoint_store.steps(place)) if cfg.resume else 0
    num_left = cfg.keep_checkpoints + 2 - num_there  # with the best and a new one
    weight_bytes = sizes.DTYPE_BYTES[cfg.master_dtype]
    num_checkpoints = cfg.saves_checkpoints * max(num_left, 1)
    state_bytes = num_checkpoints * (weight_bytes + memory.moment_bytes(cfg))
    need_bytes = num_params * (state_bytes + cfg.save_model * weight_bytes)
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
        by_text = FULL_TEXT.search(str(error))
        number = int(by_text[1]) if by_text else getattr(error, "errno", None)
        if number not in IS_FULL:
            raise
        place, todo = cfg.resolved_output_dir, IS_FULL[number]
        rule, remedy = f"takes no more ({os.strerror(number)})", f"{todo}, then start again"
        if saved := checkpoint_store.last_step(place):
            rule += f"; what was trained is saved up to step {saved}"
            remedy = f"{todo}, then {resume_of(place)} goes on"
        raise UserError(f"the disk of {place}", rule, remedy, RUN_FAILED) from error
