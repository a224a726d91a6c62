"""The public API: a run from a script, on ranks of its own and inside a process group."""

import atexit
import contextlib
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest

import fsdp_qlora
from fsdp_qlora import api
from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.errors import UserError
from tests import warm
from tests.ranks import run_ranks

NUM_STEPS = 4


def rows_of(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / "data.jsonl").read_text().splitlines()]


def config(place: Path, name: str, **more) -> fsdp_qlora.TrainConfig:
    values = {"world_size": 2, "max_steps": NUM_STEPS, "context_length": 64, "lora_rank": 4}
    values |= {"lr": 1e-3, "eval_split": "8", "eval_every": "2", "sample_prompts": "off"}
    names = {"model_name": str(place / "model"), "output_dir": str(place / name)}
    return fsdp_qlora.TrainConfig(**values | names | more)


def train_in_group(world, place: Path):
    """What a worker of Ray Train does: the group is there already."""
    steps, said = [], io.StringIO()
    cfg = config(place, "group", push_to_hub="me/new", hang_timeout=60.0)
    os.environ["HF_TOKEN"] = "hf_ofNobody"
    with patch("fsdp_qlora.export.hub.push") as push, contextlib.redirect_stdout(said):
        result = fsdp_qlora.train(cfg, rows_of(place), lambda line: steps.append(line["loss"]))
    idle = "--hang_timeout: without effect, what has started the ranks decides" in said.getvalue()
    assert idle == (world.rank == 0)  # nobody may end a process that is the caller's
    return result.losses, steps, [call.args for call in push.call_args_list]


def test_rows_of_a_script_train_on_ranks_of_their_own_and_in_a_group(place, monkeypatch):
    """Callbacks get every step and evaluation; both ways give equal losses, bit for bit."""
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(place / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    steps, evaluations = [], []
    cfg = config(place, "script")
    plan = fsdp_qlora.plan(cfg)
    assert plan.found.fits and plan.to_dict()["peak_host_gib"] > 0
    result = fsdp_qlora.train(cfg, rows_of(place), steps.append, evaluations.append)
    assert [line["step"] for line in steps] == list(range(1, NUM_STEPS + 1))
    assert result.losses == [line["loss"] for line in steps]
    assert result.evaluations == evaluations and len(evaluations) == 3
    assert result.memory["host"]["forward"] and len(result.memory["ranks"]) == 2
    assert (result.output_dir / "adapter_model.safetensors").is_file()
    (first, calls, pushed), (second, no_calls, silent) = run_ranks(train_in_group, 2, place)
    assert first == second == calls == result.losses and no_calls == []
    assert pushed == [(place / "group", "me/new")] and silent == []
    monkeypatch.setenv("HF_TOKEN", "hf_ofNobody")
    with patch("fsdp_qlora.export.hub.push") as push:  # which a kill may have prevented
        cfg = fsdp_qlora.TrainConfig(resume=str(place / "script"), push_to_hub="me/new")
        again = fsdp_qlora.train(cfg)
    assert (again.output_dir, again.losses) == (place / "script", result.losses)
    assert [call.args for call in push.call_args_list] == [(place / "script", "me/new")]


def test_a_record_that_a_restart_has_cut_is_told_once(tmp_path):
    """Steps and evaluations that are taken again call nobody a second time."""
    path, heard = tmp_path / "metrics.jsonl", []
    follower = fsdp_qlora.api._Follower(path, heard.append, heard.append)
    follower.poll()
    lines = [{"step": 1}, {"event": "eval", "step": 1}, {"step": 2}, {"event": "eval", "step": 2}]
    texts = ["\0\0 torn\n", *(json.dumps(line) + "\n" for line in lines)]
    for text in ("".join(texts) + '{"st', texts[1], "".join(texts)):
        path.write_text(text)
        follower.poll()
    assert heard == lines and [*follower.events["eval"].values()] == lines[1::2]


def test_what_cannot_be_is_an_exception(place, monkeypatch):
    """A rule of the options, a row that is no JSON, and a callback that has seen enough."""
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(place / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="lr"):
        config(place, "x", lr=0)
    with pytest.raises(UserError, match="every row must be a dict of JSON values"):
        fsdp_qlora.train(config(place, "x"), [{"text": object()}])
    with pytest.raises(UserError, match="does not exist"):
        fsdp_qlora.train(config(place, "x", dataset=str(place / "no.jsonl")))

    def enough(line):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        fsdp_qlora.train(config(place, "stopped", max_steps=99), rows_of(place), on_step=enough)
    assert issubclass(fsdp_qlora.TrainError, RuntimeError)


ENDED = """import atexit, pathlib, sys
threads = pathlib.Path("/proc/self/task").glob("*/comm")
atexit.register(lambda: print([path.read_text() for path in threads], file=sys.stderr))
from fsdp_qlora.__main__ import main
sys.exit(main(sys.argv[1:]))"""


def generate(place: Path, *flags: str) -> str:
    """What the command answers; none of gloo's threads is left, which may abort its end."""
    argv = [sys.executable, "-c", ENDED, "generate", "--prompt=What is 5?", *flags]
    env = {**os.environ, "PYTHONPATH": str(PROJECT_DIR)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("['python") and "gloo" not in done.stderr
    return done.stdout.removesuffix("\n")


def train_alone(world, place: Path) -> None:
    """Train the adapter that shall answer."""
    os.environ["FSDP_QLORA_CACHE"] = str(place / "cache")
    fsdp_qlora.train(config(place, "adapter", world_size=1, lr=3e-2), rows_of(place))


def ask(place: Path) -> None:
    """Write the answers of the adapter and of its merged model; the environment stays."""
    env, answers, at_exit = dict(os.environ), [], []
    for path in (place / "adapter", place / "merged"):
        model = fsdp_qlora.load_model(path)
        at_exit.append(atexit._ncallbacks())
        answers += [model.generate("What is 5?", max_tokens=6, temperature=t) for t in (0.0, 0.7)]
        with pytest.raises(UserError, match="is in a process group already"):
            fsdp_qlora.load_model(path)
        model.close()
    assert env == dict(os.environ) and at_exit[0] == at_exit[1]
    (place / "answers.json").write_text(json.dumps(answers))


def test_a_loaded_model_answers_as_the_command_generate_does(place, monkeypatch):
    """An adapter, and the plain model that `merge` makes of it."""
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(place / "cache"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run_ranks(train_alone, 1, place)
    assert fsdp_qlora.merge(place / "adapter", place / "merged") == place / "merged"
    assert json.loads((place / "merged" / "merge.json").read_text())["added_to"] == "dequantized"
    warm.call(ask, place)
    answers = json.loads((place / "answers.json").read_text())
    kinds = (f"--adapter={place / 'adapter'}", f"--model_name={place / 'merged'}")
    drawn = ("--temperature=0.0", "--temperature=0.7")
    rows = [(kind, "--num_tokens=6", flag) for kind in kinds for flag in drawn]
    assert answers[::3] == [generate(place, *row) for row in rows[::3]]
    words = ("generate", "--prompt=What is 5?")
    asked = [warm.start([*words, *row], place, warm.command) for row in rows[1:3]]
    assert [(run.wait(), run.out) for run in asked] == [(0, f"{text}\n") for text in answers[1:3]]
    assert any(answers)


def test_ranks_of_a_group_keep_the_same_rows_at_the_same_time(tmp_path, monkeypatch):
    """Each has the whole file as soon as it has the path, whatever the others do."""
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path))
    for number in range(5):
        rows = [{"text": f"row {number}, {i}"} for i in range(2000)]
        with ThreadPoolExecutor(8) as ranks:
            texts = ranks.map(lambda _, rows=rows: api._keep_rows(rows).read_text(), range(8))
            assert all([*map(json.loads, text.splitlines())] == rows for text in texts)
    assert len([*(tmp_path / "rows").iterdir()]) == 5  # nothing else is left
