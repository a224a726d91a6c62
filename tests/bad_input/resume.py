"""Bad checkpoints: damaged, of another run, or no checkpoint at all."""

import contextlib
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fsdp_qlora import arch, checkpoint_store, config
from fsdp_qlora.checkpoint_store import MANIFEST, OPTIMIZER, STATE, WEIGHTS, Array
from fsdp_qlora.errors import INTEGRITY
from fsdp_qlora.training.preflight import fingerprint
from tests import small_tokenizers
from tests.bad_input.case import VOCAB_SIZE, Case, Place
from tests.bad_input.models import loop
from tests.model_files import write_model

STEP_20 = "out/checkpoints/step-20"
CALL = b"cos\nsystem\n(S'touch was-run'\ntR."  # pickle of os.system("touch was-run")


def save(place: Place, **changes: object) -> Path:
    """Write a run with the checkpoints of steps 10 and 20, as the trainer does; the last's path."""
    argv = place.flags()
    cfg = config.parse(argv)
    info = arch.read(cfg.model_name, need_weights=True)
    found = fingerprint(cfg, info, info.digest(1), 1)
    state = {"config": config.to_dict(cfg), "given": sorted(config.given(argv))}
    state |= {"fingerprint": found} | changes
    data = Array("F32", (64,), memoryview(bytearray(range(256))))
    tensors = {WEIGHTS: {"a": data}, OPTIMIZER: {"a.exp_avg": data}}
    root = place.out / "checkpoints"
    for step in (10, 20):
        checkpoint_store.write(root, step, tensors, state)
    return root / "step-20"


def damaged(name: str, change: Callable[[Path], object]):
    """A run whose last checkpoint has a file changed."""
    return lambda place: change(save(place) / name)


def content(data: bytes):
    """Other content."""
    return lambda path: path.write_bytes(data)


def cut(path: Path) -> None:
    """The end is missing."""
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def replaced(make: Callable[[Path], object]):
    """Something that is no file stands there."""

    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def linked(path: Path) -> None:
    """A link to the file, which lies elsewhere."""
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def renamed(place: Place) -> None:
    """A checkpoint under the name of another step."""
    path = save(place)
    path.rename(path.with_name("step-30"))


def emptied(place: Place) -> None:
    """Directories without files, as some trainers leave them."""
    save(place)
    shutil.rmtree(place.out / "checkpoints")
    (place.root / STEP_20).mkdir(parents=True)


def all_damaged(place: Place) -> None:
    """No checkpoint of the run is whole."""
    flip(save(place) / WEIGHTS)
    cut(place.out / "checkpoints" / "step-10" / OPTIMIZER)


def after_save(change: Callable[[Place], object]):
    """The rest of the place changes after the run has saved."""

    def make(place: Place) -> None:
        save(place)
        change(place)

    return make


def other_tokenizer(place: Place) -> None:
    """Another tokenizer."""
    with contextlib.redirect_stderr(io.StringIO()):
        small_tokenizers.save(place.model, "plain")


def other_base(place: Place) -> None:
    """Weights of another size."""
    write_model(place.model, vocab_size=VOCAB_SIZE, intermediate_size=64)


def state(**changes: object):
    """A whole checkpoint, whose state says something else."""
    return lambda place: save(place, **changes)


def bad(name: str, change: Callable[[Path], object], file: str = WEIGHTS) -> Case:
    """A damaged file, in the checkpoint that is asked for."""
    return Case(name, f"step-20/{file}", AT_20, damaged(file, change), INTEGRITY)


def other(name: str, words: str, *flags: str, make: Callable[[Place], object] = save) -> Case:
    """Another run than that of the checkpoint; a table follows the line."""
    return Case(name, words, (*AT_RUN, *flags), make, has_table=True)


AT_20, AT_RUN = (f"--resume={{root}}/{STEP_20}",), ("--resume={root}/out",)
CASES = [
    bad("last byte lost", cut),
    bad("one bit flipped", flip),
    bad("absent", Path.unlink),
    bad("a pickle", content(CALL)),
    bad("a directory", replaced(os.mkdir)),
    bad("a pipe", replaced(os.mkfifo)),
    bad("a link to itself", replaced(loop)),
    bad("a link elsewhere", linked),
    bad("state of another step", lambda p: p.write_text(p.read_text().replace("20", "30")), STATE),
    bad("manifest cut off", cut, MANIFEST),
    bad("manifest a list", content(b"[]"), MANIFEST),
    bad("manifest deep", content(b"[" * 100_000), MANIFEST),
    bad("manifest not UTF-8", content(b"\xff"), MANIFEST),
    bad("manifest absent", Path.unlink, MANIFEST),
    bad("a file too many", content(CALL), "extra.pkl"),
    Case("renamed", "step 30", ("--resume={root}/out/checkpoints/step-30",), renamed, INTEGRITY),
    Case("no such directory", "give that of a run", ("--resume={root}/none",)),
    Case("a file", "no such directory", ("--resume={root}/rows.jsonl",)),
    Case("empty checkpoint", "no whole checkpoint", AT_RUN, emptied, INTEGRITY),
    Case("none is whole", "no whole checkpoint", AT_RUN, all_damaged, INTEGRITY),
    Case("bare, and nothing there", "no whole checkpoint", ("--resume",), code=INTEGRITY),
    Case("elsewhere", "is not where", (*AT_RUN, "--output_dir={root}/b"), save),
    Case("a run again without it", "holds files already", (), save),
    other("other rank", "with another lora_rank", "--lora_rank=8"),
    other("other seed", "--allow_data_change", "--seed=7"),
    other("other tokenizer", "with another tokenizer", make=after_save(other_tokenizer)),
    other("other base", "with another base", make=after_save(other_base)),
    Case("state without a fingerprint", "(fingerprint)", AT_20, state(fingerprint=None), INTEGRITY),
    Case("settings a list", "(config)", AT_20, state(config=[1]), INTEGRITY),
    Case("names a number", "(given)", AT_20, state(given=7), INTEGRITY),
    Case("of a version to come", "(version)", AT_20, state(version=99), INTEGRITY),
]
