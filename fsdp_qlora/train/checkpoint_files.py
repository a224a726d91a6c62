"""The files of one checkpoint: safetensors and JSON, whole or not there; no torch.

    checkpoints/step-N/  weights.safetensors  optimizer.safetensors  state.json  manifest.json

They are written to `.tmp-step-N`, brought to the disk, named with size and SHA-256 in the manifest,
read back, and only then renamed. A checkpoint counts when every byte is what its manifest says.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fsdp_qlora.errors import INTEGRITY, UserError

CHECKPOINTS = "checkpoints"
WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
STATE, MANIFEST = "state.json", "manifest.json"
BEST = "best.json"
VERSION = 1
CHUNK_BYTES = 8 * 2**20
STEP_NAME = re.compile(r"step-(\d+)")
TEMPORARY = ".tmp-"
DRAFT_NAME = re.compile(r"\.tmp-(step-\d+|best\.json)")
ASIDE_NAME = re.compile(r"step-\d+\.aside-\d+")
OWN_NAMES = frozenset((WEIGHTS, OPTIMIZER, STATE, MANIFEST))


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


@dataclass(frozen=True)
class Saved:
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


def write(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Array]],
    state: dict[str, Any],
    at: Callable[[str], None] = lambda point: None,
) -> Path:
    """Write a checkpoint; when this returns it is there, whatever happens to the machine.

    Args:
        root: directory of the checkpoints of a run.
        step: names it; one of that name is set aside.
        tensors: file name -> tensors by name.
        state: everything else, as JSON can hold it.
        at: told which point of the work is reached, see train/faults.py.

    Returns:
        Its directory.

    Raises:
        OSError: the disk does not take it; nothing of it is left.
        UserError: what was read back is not what was written.
    """
    draft, final = root / f"{TEMPORARY}step-{step}", root / f"step-{step}"
    shutil.rmtree(draft, ignore_errors=True)
    parts: dict[str, Iterator[Any]] = {n: _safetensors(arrays) for n, arrays in tensors.items()}
    parts[STATE] = iter([_dump({"version": VERSION, "step": step, **state})])
    try:
        at("save-mkdir")
        draft.mkdir(parents=True)
        files = {}
        for name, chunks in parts.items():
            at("save-before-file")
            files[name] = _write(draft / name, chunks)
            at("save-after-file")
        at("save-manifest")
        _write(draft / MANIFEST, iter([_sealed(step, files)]))
        at("save-fsync")
        sync(draft)
        read(draft, step)
        at("save-rename")
        if os.path.lexists(final):
            set_aside(final)
        draft.rename(final)
        at("save-dir-fsync")
        sync(root)
        sync(root.parent)
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


def _dump(table: dict[str, Any]) -> bytes:
    return json.dumps(table, indent=1, allow_nan=False).encode() + b"\n"


def _sealed(step: int, files: dict[str, Any]) -> bytes:
    """The manifest: it carries a hash of itself, so that no byte of it may change either."""
    table: dict[str, Any] = {"version": VERSION, "step": step, "files": files}
    return _dump(table | {"sha256": hashlib.sha256(_dump(table)).hexdigest()})


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


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def read(path: Path, step: int | None = None) -> Saved:
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
        files = json.loads(raw).get("files", {}) if raw else {}
        is_sealed = raw == _sealed(step, files)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        is_sealed = False
    if not is_sealed:
        rule = f"is not the manifest of a finished checkpoint of step {step}"
        raise UserError(str(path / MANIFEST), rule, remedy, INTEGRITY)
    for name in sorted({*files, *os.listdir(path)} - {MANIFEST}):
        fault = _fault(path / name, files.get(name))
        if fault:
            raise UserError(str(path / name), fault, remedy, INTEGRITY)
    return Saved(path, step, json.loads((path / STATE).read_bytes()))


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _fault(path: Path, said: dict[str, Any] | None) -> str:
    """What is wrong with a file; "" for nothing."""
    if said is None:
        return "is not in the manifest"
    try:
        if not _is_file(path):
            return "is no plain file"
        if path.stat().st_size != said["bytes"]:
            return f"has {path.stat().st_size:,} bytes, and the manifest says {said['bytes']:,}"
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        known = str(said["sha256"])
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (KeyError, TypeError):
        return "has no size and hash in the manifest"
    return "" if found == known else f"has SHA-256 {found[:12]}, and the manifest {known[:12]}"


def steps(run_dir: Path) -> list[int]:
    """The steps of which there is a checkpoint, valid or not, the latest first.

    Args:
        run_dir: output directory of the run.

    Raises:
        UserError: their directory cannot be read, so that nobody knows (code 5).
    """
    place = run_dir / CHECKPOINTS
    try:
        names = os.listdir(place)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise UserError(str(place), rule, "see to the disk, then try again", INTEGRITY) from error
    found = [match for match in map(STEP_NAME.fullmatch, names) if match]
    return sorted((int(match[1]) for match in found), reverse=True)


def may_hold_any(run_dir: Path) -> bool:
    """Whether a run has checkpoints, whole or not; where that cannot be read, it may have."""
    try:
        return bool(steps(run_dir))
    except UserError:
        return True


def last_step(run_dir: Path) -> int | None:
    """The step of the last checkpoint, as far as its name tells; None: none is known."""
    try:
        return next(iter(steps(run_dir)), None)
    except UserError:
        return None


def best_of(run_dir: Path) -> dict[str, Any] | None:
    """What was marked as the best checkpoint: step and loss; None: nothing was.

    Raises:
        UserError: the mark is there and cannot be read (code 5).
    """
    path = run_dir / CHECKPOINTS / BEST
    try:
        best = json.loads(path.read_bytes())
        if isinstance(best["step"], int) and best["loss"] == best["loss"]:
            return best
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
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
    path = run_dir / CHECKPOINTS / BEST
    draft = path.with_name(f"{TEMPORARY}{BEST}")
    _write(draft, iter([_dump({"step": step, "loss": loss})]))
    draft.replace(path)


def prune(
    run_dir: Path, num_kept: int, at: Callable[[str], None] = lambda point: None
) -> list[int]:
    """Remove all but the last checkpoints, the best one, and the last one with finite weights.

    Args:
        run_dir: output directory of the run.
        num_kept: how many of the last valid ones stay.
        at: see `write`.

    Returns:
        The steps whose checkpoints were removed. None is removed while fewer valid ones are there,
        or while it cannot be read which one is the best.
    """
    try:
        best = best_of(run_dir) or {}
    except UserError:
        return []
    kept: list[Saved] = []
    has_finite = False
    for step in steps(run_dir):
        if len(kept) >= num_kept and has_finite:
            break
        saved = _valid(run_dir / CHECKPOINTS / f"step-{step}")
        is_finite = saved is not None and saved.state.get("is_finite") is True
        if saved is not None and (len(kept) < num_kept or is_finite):
            kept.append(saved)
            has_finite = has_finite or is_finite
    stays = {saved.step for saved in kept} | {best.get("step")}
    last = kept[0].step if len(kept) >= num_kept else 0
    old = [step for step in steps(run_dir) if step < last and step not in stays]
    gone = [step for step in old if is_ours(run_dir / CHECKPOINTS / f"step-{step}")]
    at("prune-before")
    for step in gone:
        remove(run_dir / CHECKPOINTS / f"step-{step}")
    at("prune-after")
    return gone


def _valid(path: Path) -> Saved | None:
    try:
        return read(path)
    except (UserError, OSError):
        return None


def is_ours(path: Path) -> bool:
    """Whether a directory is a checkpoint that this trainer wrote, whole or damaged.

    Args:
        path: any directory.

    Returns:
        True when it holds no other files than those of a checkpoint, and its manifest or its state
        is of our form.
    """
    try:
        has_others = bool(set(os.listdir(path)) - OWN_NAMES)
    except OSError:
        return False
    return not has_others and any(_has_mark(path / name) for name in (MANIFEST, STATE))


def _has_mark(path: Path) -> bool:
    try:
        table = json.loads(path.read_bytes())
        return isinstance(table["step"], int) and isinstance(table["version"], int)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def set_aside(path: Path) -> Path:
    """Rename a checkpoint, so that it counts no more and nothing of it is lost.

    Args:
        path: its directory.

    Returns:
        Its new path, "step-N.aside-1" or a higher number.
    """
    names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    path.rename(aside)
    return aside


def remove(path: Path) -> None:
    """Remove a checkpoint; killed half-way it leaves nothing that looks like one."""
    draft = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(draft, ignore_errors=True)
    path.rename(draft)
    shutil.rmtree(draft, ignore_errors=True)


def sweep(run_dir: Path) -> None:
    """Remove what a killed run has left half-done."""
    for path in (run_dir / CHECKPOINTS).glob(f"{TEMPORARY}*"):
        if not DRAFT_NAME.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_all(run_dir: Path) -> None:
    """Remove every checkpoint that this trainer wrote, those set aside too, and nothing else."""
    root = run_dir / CHECKPOINTS
    sweep(run_dir)
    for path in list(root.glob("step-*")):
        is_named = STEP_NAME.fullmatch(path.name) or ASIDE_NAME.fullmatch(path.name)
        if is_named and is_ours(path):
            remove(path)
    (root / BEST).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else lies there, and stays
        root.rmdir()
