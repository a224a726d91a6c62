"""What --resume stands for, what it refuses, and who may write where; no torch."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora import arch, config, errors, record
from fsdp_qlora import checkpoint_store as store
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.distributed import launch
from fsdp_qlora.errors import DONE, ENVIRONMENT, INPUT, INTEGRITY, UserError
from fsdp_qlora.planning.sizes import count_trained
from fsdp_qlora.training import preflight
from tests.model_files import write_model

STEP = 20
# Flags of another run -> the field that differs.
OTHER_MODEL = {
    "--lora_rank=8": "lora_rank",
    "--lora_alpha=8": "lora_alpha",
    "--use_rslora": "use_rslora",
    "--lora_dropout=0.1": "lora_dropout",
    "--lora_target_modules=q_proj": "targets",
    "--quant_type=fp4": "format",
    "--train_type=bnb_dora": "adapter",
    "--precision=fp32": "compute_dtype",
    "--optimizer=sgd": "optimizer",
}
OTHER_DATA = {
    "--seed=7": "seed",
    "--context_length=64": "context_length",
    "--packing=on": "packing",
    "--train_on=all": "train_on",
    "--system_prompt=Be-brief": "system_prompt",
    "--template=alpaca": "template",
    "--batch_size=3": "global_batch",
}
HOLD = """
import sys, time
from pathlib import Path
from fsdp_qlora import checkpoint_store
checkpoint_store.lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def flags(model: Path, out: Path, *more: str) -> list[str]:
    return [f"--model_name={model}", "--dataset=dummy", f"--output_dir={out}", "--lr=0.5", *more]


def found_in(argv: list[str]) -> dict:
    cfg = config.parse(argv)
    info = arch.read(cfg.model_name, need_weights=True)
    return preflight.fingerprint(cfg, info, info.digest(1), 2)


def save(argv: list[str], step: int = STEP, **more) -> store.SavedCheckpoint:
    """A checkpoint as a run with these flags writes it."""
    cfg, given = config.parse(argv), sorted(config.given(argv))
    state = {"config": config.to_dict(cfg), "given": given, "fingerprint": found_in(argv)}
    array = store.Array("F32", (2,), memoryview(bytes(8)))
    tensors = {name: {"a": array} for name in (store.WEIGHTS, store.OPTIMIZER)}
    root = cfg.resolved_output_dir / store.CHECKPOINTS
    return store.read(store.write(root, step, tensors, {**state, "total_s": 1.0, **more}))


def test_a_checkpoint_brings_the_options_of_its_run(tmp_path: Path, model: Path):
    """--resume DIR alone goes on; what stands beside it comes first."""
    out = tmp_path / "out"
    more = ("--lora_rank=4", "--batch_size=3", "--packing=off", "--warmup_steps=9")
    saved = save(flags(model, out, *more))
    for wanted in (out, saved.path):
        argv, found = preflight.expand_resume([f"--resume={wanted}", "--lr=0.25"])
        cfg = config.parse(argv)
        assert found == saved and cfg.resume == str(saved.path)
        assert (cfg.lora_rank, cfg.batch_size, cfg.packing, cfg.lr) == (4, 3, "off", 0.25)
        assert (cfg.model_name, cfg.output_dir) == (str(model), str(out))
        assert preflight.expand_resume(argv)[0][-2:] == argv[-2:]  # the ranks read the same
    other, _ = preflight.expand_resume([f"--resume={out}", "--eval_samples=7", "--learning_rate=3"])
    assert (config.parse(other).eval_split, config.parse(other).lr) == ("7", 3)
    traced, _ = preflight.expand_resume([f"--resume={out}", "--profile", "--warmup_steps=2"])
    assert (config.parse(traced).profile, config.parse(traced).warmup_steps) == (2, 9)
    bare, _ = preflight.expand_resume([f"--output_dir={out}", "--resume"])
    assert config.parse(bare).resume == str(saved.path)


def test_what_goes_on_with_a_run_can_be_pasted_into_a_shell():
    for name in ("out/mine", "out/<b>run & 1", "it's $HOME"):
        (how,) = re.findall("; (.*) goes on", str(errors.Stopped(signal.SIGTERM, Path(name))))
        assert shlex.split(how) == ["--resume", name]


def test_python_that_only_a_checkpoint_names_never_runs(tmp_path: Path, model: Path):
    """The command line must name it again; the line says how."""
    for flag in ("dataset", "eval_split"):
        saved = save([*flags(model, tmp_path / "out"), f"--{flag}=own.py:rows"])
        with pytest.raises(UserError, match=f"add --{flag} own.py:rows$"):
            preflight.expand_resume([f"--resume={saved.path}", "--lr=0.25"])
        argv, _ = preflight.expand_resume([f"--resume={saved.path}", f"--{flag}=own.py:rows"])
        assert getattr(config.parse(argv), flag) == "own.py:rows"
        assert preflight.expand_resume(argv)[0][-2:] == argv[-2:]


def test_a_default_of_today_does_not_change_a_run_of_yesterday(tmp_path: Path, model: Path):
    """Whatever the checkpoint has counts, given or not; options that are no more are named."""
    out, reported = tmp_path / "out", list[str]()
    argv = [f"--model_name={model}", "--dataset=dummy", f"--output_dir={out}"]
    yesterday = {"lr": 0.125, "lora_rank": 24, "save_every": "7", "no_such_option": 3}
    given = ["use_cpu_offload", "no_such_option"]
    save(argv, config=config.to_dict(config.parse(argv)) | yesterday, given=given)
    words, _ = preflight.expand_resume([f"--resume={out}"], reported.append)
    cfg = config.parse(words)
    assert (cfg.lr, cfg.lora_rank, cfg.save_every) == (0.125, 24, "7")
    assert "use_cpu_offload" in config.given(words)  # the plan must not choose it anew
    (line,) = [line for line in reported if "no more" in line]
    assert "no_such_option" in line


def test_a_run_of_a_newer_format_is_refused_in_one_line(tmp_path: Path, model: Path):
    """One without a number is of format 1."""
    out = tmp_path / "out"
    save(flags(model, out), run_format=record.RUN_FORMAT + 1)
    with pytest.raises(UserError, match="run format 3, and this version reads up to 2") as caught:
        preflight.expand_resume([f"--resume={out}"])
    assert caught.value.code == INTEGRITY
    (out / "metrics.jsonl").write_text('{"event": "run", "run_format": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:1: is of run format 3"):
        record.read(out)


def test_auto_starts_anew_where_nothing_is(tmp_path: Path):
    said: list[str] = []
    argv = ["--resume=auto", f"--output_dir={tmp_path / 'none'}"]
    words, saved = preflight.expand_resume(argv, said.append)
    assert (
        saved is None
        and preflight.saved_of(config.parse(words)) is None
        and "fresh start" in said[0]
    )
    assert preflight.expand_resume(["--lr=1"]) == (["--lr=1"], None)
    with pytest.raises(UserError, match="does not say which run"):
        preflight.expand_resume(["--resume"])


def test_every_field_that_differs_is_refused_with_a_table(tmp_path: Path, model: Path):
    """Those of the data may change when the user says so."""
    common = flags(model, tmp_path / "out")
    saved = found_in(common)
    for flag, name in (OTHER_MODEL | OTHER_DATA).items():
        now = found_in([*common, flag])
        assert [key for key in saved if saved[key] != now[key]] == [name]
        with pytest.raises(UserError, match=name) as caught:
            preflight.check_same(saved, now, allow_data_change=False)
        assert caught.value.code == INPUT
        head, row = caught.value.__notes__
        assert "checkpoint" in head and row.split()[0] == name
        if name in OTHER_DATA.values():
            assert len(preflight.check_same(saved, now, allow_data_change=True)) == 1
        else:
            with pytest.raises(UserError):
                preflight.check_same(saved, now, allow_data_change=True)
    write_model(tmp_path / "model", vocab_size=97)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="another base, base_samples, tokenizer"):
        preflight.check_same(saved, found_in(common), allow_data_change=False)
    assert preflight.check_same(saved, saved, allow_data_change=False) == []
    assert preflight.library_notes({"torch": "1", "x": "2"}, {"torch": "2"}) == [
        "warning   torch was 1, now 2"
    ]


def call(*argv: str) -> tuple[int, str, str]:
    command = [sys.executable, str(PROJECT_DIR / "train.py"), *argv]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return run.returncode, run.stdout, run.stderr


def test_a_run_that_is_complete_is_already_done(tmp_path: Path, model: Path):
    """Unless more steps, or an earlier one, are asked for; it needs nothing but the directory."""
    out = tmp_path / "out"
    argv = flags(model, out, "--max_steps=20", "--save_model=false")
    early, saved = save(argv, 10), save(argv)
    summary = out / "summary.json"
    summary.write_text(json.dumps({"is_complete": False}))
    cfg = config.parse(preflight.expand_resume([f"--resume={out}"])[0])
    assert not preflight.is_done(saved, cfg)
    summary.write_text(json.dumps({"is_complete": True}))
    more = config.parse(preflight.expand_resume([f"--resume={out}", "--max_steps=30"])[0])
    assert preflight.is_done(saved, cfg) and not preflight.is_done(saved, more)
    assert not preflight.is_done(early, cfg)
    (tmp_path / "mine.toml").write_text(f'resume = "{out}"\n')  # a recipe is verified as a flag is
    assert preflight.expand_resume([f"--recipe={tmp_path}/mine.toml"])[1] == saved
    code, said, err = call(f"--resume={out}")
    assert (code, err) == (DONE, "") and said.startswith("already done")
    assert summary.exists()


def test_a_directory_belongs_to_one_run_at_a_time(tmp_path: Path):
    """The second is told whose it is; a killed one holds nothing."""
    out = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True, cwd=PROJECT_DIR
    )
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    cfg = config.parse([f"--output_dir={out}", "--overwrite"])
    with pytest.raises(UserError, match=f"in use by another run .pid {first.pid} on ") as caught:
        launch.claim_output_dir(cfg)
    assert caught.value.code == INPUT and [p.name for p in out.iterdir()] == [store.LOCK]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert launch.claim_output_dir(config.parse([f"--output_dir={out}"])) == out


def whole(directory: Path) -> dict[str, bytes]:
    """Every file below a directory but the lock, which says the second it was taken."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != store.LOCK)
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


def claim(*argv: str) -> Path:
    return launch.claim_output_dir(config.parse(preflight.expand_resume(argv)[0]))


def test_a_directory_of_a_run_is_kept_or_emptied_of_checkpoints(tmp_path: Path, model: Path):
    out = tmp_path / "out"
    save(flags(model, out))
    store.set_aside(save(flags(model, out)).path)
    save(flags(model, out))
    (out / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"holds files already; .*--resume to go on"):
        claim(f"--output_dir={out}")
    claim(f"--resume={out}")
    assert store.steps(out) == [STEP] and (out / "metrics.jsonl").exists()
    claim(f"--output_dir={out}", "--overwrite")
    assert {path.name for path in out.iterdir()} == {store.LOCK, "logs"}


def test_auto_removes_nothing_when_no_checkpoint_is_readable(tmp_path: Path, model: Path):
    """One wrong byte in every state.json: code 5 and the way on; all was removed before."""
    out = tmp_path / "out"
    argv = flags(model, out)
    cfg = config.parse(argv)
    saved = save(argv)
    store.write(saved.path.parent, STEP + 1, {}, {})
    for path in out.rglob(store.STATE):
        path.write_bytes(path.read_bytes().replace(b"step", b"stop", 1))
    (out / store.LOCK).touch()
    config.save(cfg, out / "run_config.json", {})
    (out / "metrics.jsonl").write_text('{"step": 1}\n')
    before = whole(out)
    for more in ((), ("--overwrite=true",)):
        code, said, err = call(*argv, "--resume=auto", *more)
        assert code == INTEGRITY and "2 damaged" in err and "--overwrite" in err
        assert said.count("is passed over") == 2
        assert whole(out) == before
    claim(*argv, "--overwrite=true")
    assert whole(out) == {}


def test_auto_keeps_the_record_of_a_run_that_could_not_save(tmp_path: Path):
    """It starts anew there; what was recorded lies beside. A result is no such run."""
    out, argv = tmp_path / "out", ("--resume=auto", f"--output_dir={tmp_path / 'out'}")
    for number in (1, 2):
        claim(*argv)
        files_before = {
            "metrics.jsonl": f"{number}",
            "logs/rank1.log": "x",
            "run_config.json": "{}",
        }
        for name, text in files_before.items():
            (out / name).write_text(text)
    claim(*argv)
    assert (out / "earlier-1" / "metrics.jsonl").read_text() == "1"
    assert {str(p.relative_to(out / "earlier-2")) for p in (out / "earlier-2").rglob("*.*")} == set(
        files_before
    )
    assert {p.name for p in out.iterdir()} == {store.LOCK, "logs", "earlier-1", "earlier-2"}
    (out / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match="holds files already"):
        claim(*argv)


def test_overwrite_removes_only_what_a_run_of_ours_wrote(tmp_path: Path, model: Path):
    """Before, it removed any tree called checkpoints and any file that is called as ours are."""
    out = tmp_path / "out"
    over = (f"--output_dir={out}", "--overwrite")
    theirs = {"checkpoints/model.pt": "a", "checkpoints/step-x/b": "b", "checkpoints/.tmp-c": "c"}
    theirs |= {"logs/rank_list.txt": "d", "mine.txt": "e"}
    for name, text in (theirs | {"metrics.jsonl": "theirs"}).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    claim(*over)
    assert (out / "earlier-1" / "metrics.jsonl").read_text() == "theirs"
    path = save(flags(model, out)).path
    (out / "metrics.jsonl").write_text("ours")
    claim(*over)
    assert not path.exists() and not (out / "metrics.jsonl").exists()
    kept = whole(out)
    assert {name: text for name, text in theirs.items() if kept[name] == text.encode()} == theirs
    for name in ("checkpoints/step-7/weights.safetensors", f"checkpoints/{path.name}/notes.txt"):
        path = save(flags(model, out)).path
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("theirs")
        before = whole(out)
        with pytest.raises(UserError, match="which no run of this trainer wrote") as caught:
            claim(*over)
        assert caught.value.code == INPUT and whole(out) == before
        shutil.rmtree((out / name).parent)
    with pytest.raises(UserError, match=r"holds (model|config)"):
        claim(f"--output_dir={model}", "--overwrite")


@pytest.mark.parametrize(("precision", "weight_bytes"), [("bf16", 4), ("bf16_pure", 2)])
def test_a_disk_without_room_is_refused_before_the_run(
    tmp_path: Path, model: Path, monkeypatch, precision: str, weight_bytes: int
):
    """And one that fills meanwhile says how to go on."""
    saving = ("--save_every=5", "--keep_checkpoints=3", f"--precision={precision}")
    cfg = config.parse(flags(model, tmp_path / "out", *saving))
    info = arch.read(cfg.model_name, need_weights=False)
    num_params = count_trained(info, cfg).total
    checkpoint, result = 3 * weight_bytes, weight_bytes  # with two moments
    need_bytes = (5 * checkpoint + result) * num_params  # 3 that stay, the best, a new one
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need_bytes))
    preflight.check_room(cfg, info)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need_bytes - 1))
    with pytest.raises(UserError, match="GiB for checkpoints and the result") as caught:
        preflight.check_room(cfg, info)
    assert caught.value.code == ENVIRONMENT
    save(flags(model, tmp_path / "out"))
    for error in (OSError(28, "No space left on device"), ValueError("I/O (os error 28)")):
        with (
            pytest.raises(UserError, match=f"saved up to step {STEP}; .*--resume"),
            preflight.explain_disk_full(cfg),
        ):
            raise error
    large = pytest.raises(UserError, match=r"File too large.*ulimit -f")
    with large, preflight.explain_disk_full(cfg):
        raise OSError(27, "File too large")
    with pytest.raises(KeyError), preflight.explain_disk_full(cfg):
        raise KeyError("28")
