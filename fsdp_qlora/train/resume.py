"""Going on from a checkpoint: which one, by which options, where its record ends; no torch."""

import contextlib
import fcntl
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fsdp_qlora import cli
from fsdp_qlora.config import ALIASES, RECIPES_DIR, Config, check_own_code, from_record
from fsdp_qlora.errors import INTEGRITY, UserError
from fsdp_qlora.plan import fit
from fsdp_qlora.train import checkpoint_files as files
from fsdp_qlora.train.checkpoint_files import CHECKPOINTS, MANIFEST, Saved

LATEST, AUTO = "latest", "auto"  # a bare --resume; the same, or a fresh start if there is none
METRICS = "metrics.jsonl"
LOCK = ".lock"
LOGS = "logs"
REPORTS = ("report.html", "report.md", "report.png", "report.svg")
RUN_FILES = ("run_config.json", METRICS, "summary.json", *REPORTS)
DRAFTS = ("run_config.json.part", "summary.json.tmp", f"{METRICS}.damaged")
RANK_FILE = re.compile(r"rank\d+\.[a-z]+")  # in LOGS
RESULTS = ("*.safetensors", "*config.json", "README.md", "tokenizer*", "*.jinja")
STATE_TYPES = {"config": dict, "given": list, "fingerprint": dict}  # what is read of it here
PINNED = ("batch_size", "gradient_accumulation_steps")  # the plan would choose them anew


def latest(output_dir: Path, say: Callable[[str], None] = lambda line: None) -> Saved | None:
    """Return the latest checkpoint of a run that is whole, falling back past damaged ones.

    Args:
        output_dir: of the run.
        say: is told of every damaged one, in a line.

    Returns:
        The checkpoint; None: none is whole, see `files.may_hold_any` for whether there is any.
    """
    try:
        numbers = files.steps(output_dir)
    except UserError as error:
        say(f"resume    {error.got} {error.rule}")
        return None
    for step in numbers:
        try:
            return files.read(output_dir / CHECKPOINTS / f"step-{step}")
        except (UserError, OSError) as error:
            what = f"{error.got} {error.rule}" if isinstance(error, UserError) else str(error)
            say(f"resume    step {step} is passed over: {what}")
    return None


def latest_valid(output_dir: Path) -> Path | None:
    """Return the directory of `latest`, or None."""
    saved = latest(Path(output_dir))
    return None if saved is None else saved.path


def expand(
    argv: Sequence[str], say: Callable[[str], None] = lambda line: None
) -> tuple[list[str], Saved | None]:
    """Replace --resume in a command line by all that it stands for.

    What is not on this command line is as the checkpoint has it, never a default of today.

    Args:
        argv: arguments without the program's name.
        say: is told what is passed over.

    Returns:
        A whole command line, with the checkpoint's own directory behind --resume and the run's
        behind --output_dir; and the checkpoint. Without --resume, or with `auto` where there is no
        checkpoint: `argv`, None.

    Raises:
        UserError: there is no such checkpoint, or it is damaged (code 5); its rows come from Python
            that this command line does not name (code 2).
    """
    words = list(argv)
    for i, word in enumerate(words):
        if word == "--resume" and (i + 1 == len(words) or words[i + 1].startswith("--")):
            words[i] = f"--resume={LATEST}"
    given = cli.Reader(Config, ALIASES, RECIPES_DIR).read_argv(words)
    if "resume" not in given or given["resume"].text.lower() in ("none", "null"):
        return words, None
    wanted = given["resume"].text
    output_dir = given["output_dir"].text if "output_dir" in given else None
    saved = _find(wanted, output_dir, say)
    if saved is None:
        return words, None
    if output_dir is not None and Path(output_dir).resolve() != saved.run_dir.resolve():
        rule = f"is not where {wanted} was made"
        raise UserError(f"--output_dir {output_dir}", rule, "leave it out: the run goes on there")
    stored, removed = from_record(saved.state["config"])
    check_own_code(vars(stored), given, saved.path)
    if removed:
        say(f"resume    options that are no more, and were set: {', '.join(removed)}")
    left_open = (fit.PLACING | fit.KEEPING) - {*saved.state["given"]}  # the plan chose them
    left_open |= {"resume", "output_dir", "overwrite"}
    below = [
        f"--{name}={cli.to_text(value)}"
        for name, value in vars(stored).items()
        if name in PINNED or (name not in left_open and value != getattr(Config(), name))
    ]
    return [*below, *words, f"--output_dir={saved.run_dir}", f"--resume={saved.path}"], saved


def _find(wanted: str, output_dir: str | None, say: Callable[[str], None]) -> Saved | None:
    """The checkpoint that --resume means; None: there is none at all, and `auto` does not mind."""
    if wanted in (LATEST, AUTO) and output_dir is None:
        remedy = "give --output_dir of the run too, or --resume DIR"
        raise UserError("--resume", "does not say which run shall go on", remedy)
    place = Path(str(output_dir) if wanted in (LATEST, AUTO) else wanted)
    is_one = os.path.exists(place / MANIFEST) or files.STEP_NAME.fullmatch(place.name)
    saved = files.read(place.absolute()) if is_one else latest(place.absolute(), say)
    number = 0 if saved is not None else len(files.steps(place))
    if number or (saved is None and wanted != AUTO):
        rule = f"holds no whole checkpoint{f' ({number} damaged)' if number else ''}"
        remedy = "start anew without --resume"
        if number:
            remedy = (
                "repair one, give another --output_dir, or remove all: --overwrite, no --resume"
            )
        raise UserError(f"--resume {place}", rule, remedy, INTEGRITY)
    if saved is None:
        say(f"resume    no whole checkpoint in {place}: a fresh start")
    return None if saved is None else _checked(saved)


def _checked(saved: Saved) -> Saved:
    """A checkpoint that was written by a trainer like this one."""
    state = saved.state
    wrong = [name for name, kind in STATE_TYPES.items() if not isinstance(state.get(name), kind)]
    wrong += [] if wrong or all(isinstance(n, str) for n in state["given"]) else ["given"]
    wrong += ["version"] if state["version"] != files.VERSION else []
    if wrong:
        rule = f"is not what this version of the trainer writes ({', '.join(wrong)})"
        remedy = "go on with the version that wrote it"
        raise UserError(str(saved.path / files.STATE), rule, remedy, INTEGRITY)
    return saved


def settle(output_dir: Path, step: int) -> list[int]:
    """Set aside what came after a checkpoint that is gone on from; remove what was left half-done.

    They are damaged, could not be read just now, or the user goes back behind them: none is lost.

    Args:
        output_dir: of the run.
        step: of the checkpoint.

    Returns:
        The steps of the checkpoints that were set aside.
    """
    files.sweep(output_dir)
    later = [number for number in files.steps(output_dir) if number > step]
    for number in later:
        files.set_aside(output_dir / CHECKPOINTS / f"step-{number}")
    return later


def cut_record(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a record after a step, and after what is told of that step.

    The look at the finished model is cut off too: it is taken again. A torn last line is no line.
    A damaged line is left out, and the record with it kept beside, as "metrics.jsonl.damaged".

    Args:
        path: metrics.jsonl.
        step: the last one that stays.

    Returns:
        The lines that stay.
    """
    kept: list[dict[str, Any]] = []
    raws: list[bytes] = []
    is_damaged = False
    try:
        with path.open("rb") as file:
            found = list(file)
    except FileNotFoundError:
        return []
    for raw in found:
        line = _line(raw)
        number = line.get("step", step + 1)
        if ("event" not in line and line and number > step) or line.get("when") == "after":
            break
        is_damaged = is_damaged or (not line and raw.endswith(b"\n"))
        if line:
            kept.append(line)
            raws.append(raw)
    if is_damaged:
        os.replace(path, path.with_name(f"{path.name}.damaged"))
        path.write_bytes(b"".join(raws))
    else:
        os.truncate(path, sum(map(len, raws)))
    return kept


def _line(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else {}
        is_known = isinstance(line, dict) and ("event" in line or isinstance(line["step"], int))
        return line if is_known else {}
    except (ValueError, KeyError):
        return {}


def lock(output_dir: Path) -> None:
    """Hold a directory until this process ends, so that no second run writes there.

    Args:
        output_dir: of the run; it is made.

    Raises:
        OSError: it cannot be written to.
        UserError: another process holds it (code 2).
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    number = os.open(output_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # stays open on purpose
    try:
        fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        who = os.pread(number, 200, 0).decode("utf-8", "replace").strip()
        os.close(number)
        rule = f"is in use by another run ({who or 'just starting'})"
        remedy = "wait for it, or give another --output_dir"
        raise UserError(f"--output_dir {output_dir}", rule, remedy) from None
    who = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n"
    with contextlib.suppress(OSError):  # a full disk: the lock itself needs no room
        os.ftruncate(number, 0)
        os.pwrite(number, who.encode(), 0)


def saved_of(cfg: Config) -> Saved | None:
    """The checkpoint that a rank goes on from; its bytes were checked when it was chosen.

    Args:
        cfg: resume, as `expand` leaves it; `auto` means that there was none.
    """
    if cfg.resume in (None, AUTO):
        return None
    path = Path(cfg.resume)
    state = json.loads((path / files.STATE).read_bytes())
    return Saved(path, int(state["step"]), state)


def is_done(saved: Saved, cfg: Config) -> bool:
    """Whether the run of a checkpoint has come to its end, and is asked for no more than that.

    Args:
        saved: its last one.
        cfg: the run as it shall go on.
    """
    was = saved.state.get("config", {})
    if (was.get("max_steps"), was.get("num_epochs")) != (cfg.max_steps, cfg.num_epochs):
        return False
    return _is_complete(saved.run_dir)


def _is_complete(run_dir: Path) -> bool:
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
        return bool(summary["is_complete"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_run(directory: Path) -> bool:
    """Whether a run of this trainer wrote there: its lock, its configuration or a checkpoint.

    Args:
        directory: any.
    """
    if os.path.lexists(directory / LOCK):
        return True
    with contextlib.suppress(OSError, ValueError):
        table = json.loads((directory / "run_config.json").read_bytes())
        if isinstance(table, dict) and {"train_type", "versions"} <= table.keys():
            return True
    found = (directory / CHECKPOINTS / f"step-{step}" for step in files.steps(directory))
    return any(map(files.is_ours, found))


def refuse_files(directory: Path, overwrite: bool, is_auto: bool) -> None:
    """Refuse a directory for a new run when something lies there that it may not write over.

    Args:
        directory: output directory of the new run.
        overwrite: the user allows to remove what a run wrote there.
        is_auto: --resume auto has found no checkpoint: the record of a run that could not save one
            may lie there.

    Raises:
        UserError: it holds files (code 2), or cannot be read (code 5).
    """
    if not directory.is_dir() or all(entry.name == LOCK for entry in directory.iterdir()):
        return
    steps, got = files.steps(directory), f"--output_dir {directory}"
    if overwrite:
        places = [directory / CHECKPOINTS / f"step-{step}" for step in steps]
        others = [place for place in places if not files.is_ours(place)]
        if not is_run(directory):
            others += [place for pattern in RESULTS for place in directory.glob(pattern)]
        if others:
            rule = f"holds {others[0].relative_to(directory)}, which no run of this trainer wrote"
            raise UserError(got, rule, "move it away, or give another --output_dir")
        return
    has_result = any(directory.glob("*.safetensors")) or _is_complete(directory)
    if not is_auto or steps or has_result or not os.path.lexists(directory / LOCK):
        remedy = "give another --output_dir, or --overwrite true"
        remedy += ", or --resume to go on" if steps else ""
        raise UserError(got, "holds files already", remedy)


def clear(directory: Path) -> None:
    """Remove the record and the checkpoints of a run; what no run wrote stays.

    Args:
        directory: output directory, which `refuse_files` lets a new run have.
    """
    files.remove_all(directory)
    for path in _record(directory):
        path.unlink()


def set_record_aside(directory: Path) -> None:
    """Move what a run has recorded to "earlier-1", or a higher number, in its directory.

    Args:
        directory: of the run.
    """
    names = (directory / f"earlier-{number}" for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    for path in _record(directory):
        target = aside / path.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def _record(directory: Path) -> list[Path]:
    """The files of a run that are no checkpoint and no result."""
    logs = (directory / LOGS).glob("rank*")
    found = [directory / name for name in (*RUN_FILES, *DRAFTS)]
    found += [path for path in logs if RANK_FILE.fullmatch(path.name)]
    return [path for path in found if path.is_file() or path.is_symlink()]
