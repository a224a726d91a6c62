"""The files of a run that must outlive it: checkpoints, the record, the lock; no torch.

    checkpoints/step-N/  weights.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is written to `.tmp-step-N`, brought to the disk, listed with sizes and SHA-256 in the
manifest, read back, and only then renamed. It counts when every byte is what its manifest says.
Nothing that a run wrote is deleted unless the user said --overwrite, except checkpoints that newer
whole ones replace; what no run of this trainer wrote is never deleted.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fsdp_qlora import atomic
from fsdp_qlora.errors import INTEGRITY, UserError, one_line_of

CHECKPOINTS, LOGS, LOCK = "checkpoints", "logs", ".lock"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
STATE, MANIFEST, BEST = "state.json", "manifest.json", "best.json"
CONFIG, METRICS, SUMMARY = "run_config.json", "metrics.jsonl", "summary.json"
VERSION = 1  # of the files of a checkpoint
CHUNK_BYTES = 8 * 2**20
STEP_NAME = re.compile(r"step-(\d+)")
ASIDE_NAME = re.compile(r"step-\d+\.aside-\d+")
DRAFT_NAME = re.compile(r"\.tmp-step-\d+|\.tmp-best\.json|\.best\.json\.part")
RANK_FILE = re.compile(r"rank\d+\.[a-z]+|\.rank\d+\.error\.part")  # in LOGS; a killed rank's word
BEST_DIR, BEST_DRAFT = "best", ".tmp-best"  # the best adapter so far; in the other it is written
LATEST, AUTO = "latest", "auto"  # --resume: a bare one; the same, or a new start if there is none
REPORTS = ("report.html", "report.md", "report.png", "report.svg")
DRAFTS = (f".{CONFIG}.part", f".{SUMMARY}.part", f".{METRICS}.part", f"{METRICS}.damaged")
RESULTS = ("*.safetensors", "*config.json", "README.md", "tokenizer*", "*.jinja")
Reach = Callable[[str], None]  # is told which point of the work is reached


class Array(NamedTuple):
    """A tensor as a file holds it.

    Args:
        dtype: as safetensors names it, "F32".
        shape: of the tensor.
        data: its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


Tensors = Mapping[str, Mapping[str, Array]]  # by file and name


class SavedCheckpoint(NamedTuple):
    """A checkpoint whose files are what its manifest says.

    Args:
        path: its directory.
        step: optimizer steps that were taken.
        state: what state.json holds.
    """

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def run_dir(self) -> Path:
        """Output directory of the run that it belongs to."""
        return self.path.parent.parent

    @property
    def is_finite(self) -> bool:
        """Whether a run can go on from it: its weights are not known to be NaN or infinite."""
        return self.state.get("is_finite") is not False


def ignore(point: str) -> None:
    """Do nothing at a point of the work."""


def write(
    root: Path, step: int, tensors: Tensors, state: dict[str, Any], reach: Reach = ignore
) -> Path:
    """Write a checkpoint; when this returns it is there, whatever happens to the machine.

    Args:
        root: directory of the checkpoints of a run.
        step: names it; one of that name is set aside.
        tensors: file name -> tensors by name.
        state: everything else, as JSON can hold it.
        reach: is told which point of the work is reached.

    Returns:
        Its directory.

    Raises:
        OSError: the disk does not take it; nothing of it is left.
        UserError: what was read back is not what was written.
    """
    draft, final = root / f".tmp-step-{step}", root / f"step-{step}"
    shutil.rmtree(draft, ignore_errors=True)
    contents: dict[str, Iterator[Any]] = {n: _safetensors(arrays) for n, arrays in tensors.items()}
    contents[STATE] = iter([_json({"version": VERSION, "step": step, **state})])
    try:
        reach("save-mkdir")
        draft.mkdir(parents=True)
        files = {}
        for name, chunks in contents.items():
            reach("save-before-file")
            files[name] = _write(draft / name, chunks)
            reach("save-after-file")
        reach("save-manifest")
        _write(draft / MANIFEST, iter([_manifest(step, files)]))
        reach("save-fsync")
        atomic.sync(draft)
        read(draft, step)
        reach("save-rename")
        if os.path.lexists(final):
            set_aside(final)
        draft.rename(final)
        reach("save-dir-fsync")
        atomic.sync(root)
        atomic.sync(root.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return final


def _safetensors(arrays: Mapping[str, Array]) -> Iterator[Any]:
    """The bytes of a safetensors file, in pieces.

    Not by the library: it copies tensors under Python's lock, which would hold up the training, and
    the bytes would have to be read again for their hash.

    Source: huggingface/safetensors, README.md (format).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.data.nbytes
        header[name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        for first in range(0, array.data.nbytes, CHUNK_BYTES):
            yield array.data[first : first + CHUNK_BYTES]


def _json(table: dict[str, Any]) -> bytes:
    return json.dumps(table, indent=1, allow_nan=False).encode() + b"\n"


def _manifest(step: int, files: dict[str, Any]) -> bytes:
    table: dict[str, Any] = {"version": VERSION, "step": step, "files": files}
    return _json(table | {"sha256": hashlib.sha256(_json(table)).hexdigest()})


def _write(path: Path, chunks: Iterator[Any]) -> dict[str, Any]:
    whole, nbytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            whole.update(chunk)
            nbytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": nbytes, "sha256": whole.hexdigest()}


def read(path: Path, step: int | None = None) -> SavedCheckpoint:
    """Read a checkpoint and check every byte of it.

    Args:
        path: its directory.
        step: of the checkpoint; None: its name tells.

    Raises:
        UserError: it is not what its manifest says (code 5); names the file.
    """
    remedy = "the one before it may be whole: --resume"
    if step is None:
        match = STEP_NAME.fullmatch(path.name)
        step = int(match[1]) if match else -1
    try:
        raw = (path / MANIFEST).read_bytes() if _is_file(path / MANIFEST) else b""
        files = (atomic.parse_json(raw) or {}).get("files", {})
        is_sealed = raw == _manifest(step, files)
    except (OSError, ValueError, RecursionError):
        is_sealed = False
    if not is_sealed:
        rule = f"is not the manifest of a finished checkpoint of step {step}"
        raise UserError(str(path / MANIFEST), rule, remedy, INTEGRITY)
    for name in sorted({*files, *os.listdir(path)} - {MANIFEST}):
        if fault := fault_of(path / name, files.get(name)):
            raise UserError(str(path / name), fault, remedy, INTEGRITY)
    return SavedCheckpoint(path, step, json.loads((path / STATE).read_bytes()))


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def listing(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a manifest has them."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def fault_of(path: Path, listed: dict[str, Any] | None) -> str:
    """Compare a file with what `listing` has said of it.

    Args:
        path: of the file.
        listed: None: nothing was said.

    Returns:
        What is wrong; "" for nothing.
    """
    if listed is None:
        return "is not in the manifest"
    try:
        if not _is_file(path):
            return "is no plain file"
        if path.stat().st_size != listed["bytes"]:
            return f"has {path.stat().st_size:,} bytes, and the manifest says {listed['bytes']:,}"
        digest, expected = listing(path)["sha256"], str(listed["sha256"])
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    same = digest == expected
    return "" if same else f"has SHA-256 {digest[:12]}, and the manifest {expected[:12]}"


def steps(run_dir: Path) -> list[int]:
    """The steps of which there is a checkpoint, valid or not, the latest first.

    Args:
        run_dir: output directory of the run.

    Raises:
        UserError: their directory cannot be read, so that nobody knows (code 5).
    """
    place, remedy = run_dir / CHECKPOINTS, "see to the disk, then try again"
    with one_line_of(place, remedy, INTEGRITY, "cannot be read ({})"):
        try:
            names = os.listdir(place)
        except (FileNotFoundError, NotADirectoryError):
            return []
    matches = [match for match in map(STEP_NAME.fullmatch, names) if match]
    return sorted((int(match[1]) for match in matches), reverse=True)


def last_step(run_dir: Path, unknown: int | None = None) -> int | None:
    """Return the step of the last checkpoint, whole or not, as far as its name tells.

    Args:
        run_dir: output directory of the run.
        unknown: the answer where their directory cannot be read.

    Returns:
        The step; None: there is none.
    """
    try:
        return next(iter(steps(run_dir)), None)
    except UserError:
        return unknown


def step_dir(run_dir: Path, step: int) -> Path:
    """The directory of a checkpoint.

    Args:
        run_dir: output directory of the run.
        step: of the checkpoint.
    """
    return run_dir / CHECKPOINTS / f"step-{step}"


def latest(run_dir: Path, notify: Callable[[str], Any] = str) -> SavedCheckpoint | None:
    """Return the latest checkpoint of a run that is whole, falling back past damaged ones.

    Args:
        run_dir: output directory of the run.
        notify: is told of every damaged one, in a line.

    Returns:
        The checkpoint; None: none is whole, see `last_step` for whether there is any.
    """
    try:
        numbers = steps(run_dir)
    except UserError as error:
        notify(f"resume    {error.got} {error.rule}")
        return None
    for step in numbers:
        try:
            return read(step_dir(run_dir, step))
        except (UserError, OSError) as error:
            what = f"{error.got} {error.rule}" if isinstance(error, UserError) else str(error)
            notify(f"resume    step {step} is passed over: {what}")
    return None


def best_of(run_dir: Path) -> dict[str, Any] | None:
    """What was marked as the best checkpoint: step and loss; None: nothing was.

    Raises:
        UserError: the mark is there and cannot be read (code 5).
    """
    path = run_dir / CHECKPOINTS / BEST
    best = atomic.read_json(path)
    if isinstance(best.get("step"), int) and best.get("loss") is not None:
        return best
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        pass
    rule = "does not say which checkpoint is the best, so none is removed"
    raise UserError(str(path), rule, "the next best evaluation writes it anew", INTEGRITY)


def set_best(run_dir: Path, step: int, loss: float) -> None:
    """Mark a checkpoint as the best, so that it is kept.

    Args:
        run_dir: output directory of the run.
        step: of a checkpoint that is there.
        loss: held-out loss.
    """
    atomic.write_json(run_dir / CHECKPOINTS / BEST, {"step": step, "loss": loss})


def prune(run_dir: Path, num_kept: int, reach: Reach = ignore) -> list[int]:
    """Remove all but the last checkpoints, the best one, and the last one with finite weights.

    Args:
        run_dir: output directory of the run.
        num_kept: how many of the last valid ones stay.
        reach: see `write`.

    Returns:
        The steps whose checkpoints were removed. None is removed while fewer valid ones are there,
        or while it cannot be read which one is the best.
    """
    try:
        best = best_of(run_dir) or {}
    except UserError:
        return []
    has_finite, valid = False, list[int]()
    for step in steps(run_dir):
        if len(valid) >= num_kept and has_finite:
            break
        with contextlib.suppress(UserError, OSError):
            is_finite = read(step_dir(run_dir, step)).state.get("is_finite") is True
            has_finite = has_finite or is_finite
            valid += [step] * (len(valid) < num_kept or is_finite)
    stays, last = {*valid, best.get("step")}, valid[0] if len(valid) >= num_kept else 0
    old = [step for step in steps(run_dir) if step < last and step not in stays]
    removed = [step for step in old if is_own(step_dir(run_dir, step))]
    reach("prune-before")
    for step in removed:
        remove(step_dir(run_dir, step))
    reach("prune-after")
    return removed


def is_own(path: Path) -> bool:
    """Whether a directory is a checkpoint that this trainer wrote, whole or damaged.

    Args:
        path: any directory.

    Returns:
        True when it holds no other files than those of a checkpoint, and its manifest or its state
        is of our form.
    """
    names = {entry.name for entry in path.glob("*")}
    marks = [atomic.read_json(path / name).keys() for name in (MANIFEST, STATE)]
    is_marked = any({"step", "version"} <= mark for mark in marks)
    return is_marked and names <= {WEIGHTS, OPTIMIZER, STATE, MANIFEST}


def _unused(path: Path) -> Path:
    """The first of path-1, path-2, ... that is not there."""
    paths = (path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(path for path in paths if not os.path.lexists(path))


def set_aside(path: Path) -> Path:
    """Rename a checkpoint, so that it counts no more and nothing of it is lost.

    Args:
        path: its directory.

    Returns:
        Its new path, "step-N.aside-1" or a higher number.
    """
    return path.rename(_unused(path.with_name(f"{path.name}.aside")))


def remove(path: Path) -> None:
    """Remove a checkpoint; killed half-way it leaves nothing that looks like one."""
    draft = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(draft, ignore_errors=True)
    path.rename(draft)
    shutil.rmtree(draft, ignore_errors=True)


def remove_drafts(run_dir: Path) -> None:
    """Remove what a killed run has left half-written."""
    shutil.rmtree(run_dir / BEST_DRAFT, ignore_errors=True)
    for path in (run_dir / CHECKPOINTS).glob(".*"):
        if DRAFT_NAME.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)  # of a file or a link: nothing
            with contextlib.suppress(OSError):
                path.unlink()


def go_back(run_dir: Path, step: int) -> list[int]:
    """Set aside what came after a checkpoint that is resumed, and remove drafts.

    Those after it are damaged, could not be read just now, or the user goes back behind them: none
    is lost.

    Args:
        run_dir: output directory of the run.
        step: of the checkpoint.

    Returns:
        The steps of the checkpoints that were set aside.
    """
    remove_drafts(run_dir)
    later = [number for number in steps(run_dir) if number > step]
    for number in later:
        set_aside(step_dir(run_dir, number))
    return later


def cut_record(path: Path, step: int) -> list[dict[str, Any]]:
    """Cut a record after a step, and after the events of that step.

    The evaluation of the finished model is cut off too: it is taken again. A torn last line is no
    line. A damaged line is left out, and the record with it kept, as "metrics.jsonl.damaged".

    Args:
        path: metrics.jsonl.
        step: the last one that stays.

    Returns:
        The lines that stay.
    """
    try:
        with path.open("rb") as file:
            raw_lines = list(file)
    except FileNotFoundError:
        return []
    lines, raw_kept, is_damaged = [], [], False
    for raw in raw_lines:
        line = (atomic.parse_json(raw) or {}) if raw.endswith(b"\n") else {}
        if "event" not in line and not isinstance(line.get("step"), int):
            is_damaged = is_damaged or raw.endswith(b"\n")
            continue
        if line.get("when") == "after" or ("event" not in line and line["step"] > step):
            break
        lines.append(line)
        raw_kept.append(raw)
    if is_damaged:
        os.replace(path, path.with_name(f"{path.name}.damaged"))
        atomic.write(path, b"".join(raw_kept))
    else:
        os.truncate(path, sum(map(len, raw_kept)))
    return lines


def is_complete(run_dir: Path) -> bool:
    """Whether a run has come to its end.

    Args:
        run_dir: its output directory.
    """
    return bool(atomic.read_json(run_dir / SUMMARY).get("is_complete"))


def lock(run_dir: Path) -> None:
    """Hold a directory until this process ends, so that no second run writes there.

    Args:
        run_dir: output directory of the run; it is made.

    Raises:
        OSError: it cannot be written to.
        UserError: another process holds it (code 2).
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    number = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)  # stays open on purpose
    if not atomic.try_lock(number, kind="lockf"):
        owner = os.pread(number, 200, 0).decode("utf-8", "replace").strip()
        os.close(number)
        rule = f"is in use by another run ({owner or 'just starting'})"
        remedy = "wait for it, or give another --output_dir"
        raise UserError(f"--output_dir {run_dir}", rule, remedy)
    owner = f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n"
    with contextlib.suppress(OSError):  # a full disk: the lock itself needs no room
        os.ftruncate(number, 0)
        os.pwrite(number, owner.encode(), 0)


def is_run(directory: Path) -> bool:
    """Whether a run of this trainer wrote there: its lock, its configuration or a checkpoint.

    Args:
        directory: any.
    """
    known = atomic.read_json(directory / CONFIG).keys()
    if os.path.lexists(directory / LOCK) or {"train_type", "versions"} <= known:
        return True
    return any(is_own(step_dir(directory, step)) for step in steps(directory))


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
    numbers, got = steps(directory), f"--output_dir {directory}"
    if overwrite:
        others = [step_dir(directory, step) for step in numbers]
        others = [place for place in others if not is_own(place)]
        if not is_run(directory):
            others += [place for pattern in RESULTS for place in directory.glob(pattern)]
        if others:
            rule = f"holds {others[0].relative_to(directory)}, which no run of this trainer wrote"
            raise UserError(got, rule, "move it away, or give another --output_dir")
        return
    has_result = any(directory.glob("*.safetensors")) or is_complete(directory)
    if not is_auto or numbers or has_result or not os.path.lexists(directory / LOCK):
        remedy = "give another --output_dir, or --overwrite true"
        remedy += ", or --resume to go on" if numbers else ""
        raise UserError(got, "holds files already", remedy)


def clear(run_dir: Path) -> None:
    """Remove the record and the checkpoints of a run; what no run wrote stays.

    Args:
        run_dir: output directory, which `refuse_files` lets a new run have.
    """
    remove_drafts(run_dir)
    root = run_dir / CHECKPOINTS
    for path in list(root.glob("step-*")):
        is_named = STEP_NAME.fullmatch(path.name) or ASIDE_NAME.fullmatch(path.name)
        if is_named and is_own(path):
            remove(path)
    (root / BEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else lies there, and stays
        root.rmdir()
    for path in _record(run_dir):
        path.unlink()
    if is_run(run_dir / BEST_DIR):  # an adapter of the earlier run, with its configuration
        remove(run_dir / BEST_DIR)


def set_record_aside(run_dir: Path) -> None:
    """Move what a run has recorded to "earlier-1", or a higher number, in its directory.

    Args:
        run_dir: output directory of the run.
    """
    aside = _unused(run_dir / "earlier")
    for path in _record(run_dir):
        target = aside / path.relative_to(run_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def _record(run_dir: Path) -> list[Path]:
    """The files of a run that are no checkpoint and no result."""
    paths = [run_dir / name for name in (CONFIG, METRICS, SUMMARY, *REPORTS, *DRAFTS)]
    paths += [p for p in (run_dir / LOGS).glob("*rank*") if RANK_FILE.fullmatch(p.name)]
    return [path for path in paths if path.is_file() or path.is_symlink()]
