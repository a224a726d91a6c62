"""A finished run opened again: evaluated and asked, from its directory alone."""

import dataclasses
import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from huggingface_hub import constants

from fsdp_qlora import arch, inference, load_model
from fsdp_qlora.distributed import launch
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError
from fsdp_qlora.export import adapter as adapters
from fsdp_qlora.export import commands
from tests import small_tokenizers, tiny, warm
from tests.model_files import edit_json

TASK = """
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{target}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
BASE, REVISION = "tests/tiny", "0123456789" * 4
WORDS = ("la", "lo", "li", "lu")
ROWS = [{"prompt": f"say {w}:", "completion": f" {w} {w} {w}."} for w in WORDS] * 6
ASKED = "say la:"


def command(argv, start):
    """`fsdp-qlora argv`, with the input and the cache of the hub that the environment names."""
    constants.HF_HUB_CACHE = os.environ["HF_HUB_CACHE"]
    sys.stdin = io.StringIO(os.environ["GIVEN"])
    return warm.command(argv, start)


def run(*argv, text=""):
    place = Path(os.environ["HF_HUB_CACHE"])
    started = warm.start(argv, place, command, GIVEN=text)
    code = started.wait()
    return SimpleNamespace(returncode=code, stdout=started.out, stderr=started.err)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A tiny model, known by its name on the hub, trained on few rows by train.py."""
    directory = tmp_path_factory.mktemp("run")
    cache = directory / "models--tests--tiny"
    model = cache / "snapshots" / REVISION
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(REVISION)
    tiny.save_model(model, vocab_size=384, initializer_range=0.1)
    tiny.save_tokenizer(model, [row["prompt"] + row["completion"] for row in ROWS])
    tiny.keep_as_on_the_hub(model)
    rows = directory / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_CACHE", str(directory))
    patch.setattr(constants, "HF_HUB_CACHE", str(directory))
    done = run(
        *("train", f"--model_name={BASE}", f"--dataset={rows}", "--eval_samples=4"),
        *("--world_size=1", "--precision=fp32", "--lora_rank=4", "--lora_dropout=0", "--lr=0.02"),
        *("--batch_size=4", "--num_epochs=6", "--quant_cache=off", "--recipe=reference"),
        *(f"--output_dir={directory / 'out'}", f"--sample_prompt={ASKED}", "--sample_tokens=6"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    yield directory / "out"
    patch.undo()


def test_the_base_is_named_as_the_hub_knows_it(finished, tmp_path, monkeypatch):
    """So that peft and generate find it from any directory, on another machine too."""
    from peft import AutoPeftModelForCausalLM

    table = json.loads((finished / "adapter_config.json").read_text())
    assert (table["base_model_name_or_path"], table["revision"]) == (BASE, REVISION)
    adapter = adapters.read(finished)
    assert adapter.base_name == adapter.record["base"] == f"{BASE}@{REVISION}"
    monkeypatch.chdir(tmp_path)
    assert len(list(AutoPeftModelForCausalLM.from_pretrained(finished).parameters())) > 9
    place = Path("elsewhere")
    shutil.copytree(finished, place)
    old = f"/home/x/hub/models--tests--tiny/snapshots/{REVISION}"  # what older versions wrote
    changed = table | {"base_model_name_or_path": old, "revision": None}
    (place / "adapter_config.json").write_text(json.dumps(changed))
    assert inference.config_of(place, []).model_name == f"{BASE}@{REVISION}"
    flags = ("--adapter", str(place), "--prompt", ASKED, "--num_tokens", "6", "--raw")
    done = run("generate", *flags)
    assert done.stdout.strip() == answer_of(finished), done.stderr


def tokenizer_files(directory):
    """By name, with the chat template of the run."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    files = [directory / name for name in (*names, "chat_template.jinja")]
    return {file.name: file.read_bytes() for file in files if file.exists()}


def test_evaluate_finds_the_losses_of_the_run(finished):
    """Reference: the held-out losses that training recorded before and after."""
    done = run("evaluate", "--adapter", str(finished))
    assert done.returncode == 0, done.stderr
    found = json.loads((finished / "evaluation.json").read_text())
    before, after = (loss_of(finished, when) for when in ("before", "after"))
    assert found["base"]["loss"] == pytest.approx(before, rel=1e-5)
    assert found["adapter"]["loss"] == pytest.approx(after, rel=1e-5)
    assert after < before - 0.5


def test_figures_are_printed_where_their_record_cannot_be_written(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "_held_out", lambda opened: {})
    shutil.copytree(opened.adapter.path, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink(missing_ok=True)
    (tmp_path / "run" / "evaluation.json").mkdir()
    with pytest.raises(UserError, match=r"evaluation.json: .*; see to its directory") as caught:
        inference.evaluate(["--adapter", str(tmp_path / "run")])
    assert caught.value.code == ENVIRONMENT


def test_python_that_only_the_adapter_names_never_runs(finished):
    """`evaluate` says how to name it, and runs it then; `generate` needs no rows."""
    for name in ("adapter_config.json", "adapter_model.safetensors", "run_config.json"):
        (finished.parent / "evil").mkdir(exist_ok=True)
        shutil.copy(finished / name, finished.parent / "evil")
    place = finished.parent / "evil"
    table = json.loads((place / "run_config.json").read_text())
    rows = f"{place / 'evil.py'}:rows"
    for flag in ("dataset", "eval_split"):
        changed = json.dumps(table | {flag: f"x.jsonl, {rows}" if flag == "dataset" else rows})
        (place / "run_config.json").write_text(changed)
        (place / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'w')\nrows = 1 / 0\n")
        for rest in ((), ("--batch_size=2",), ("--world_size=2",)):
            with pytest.raises(UserError, match="if you trust it, add --" + flag) as caught:
                inference.evaluate(["--adapter", str(place), *rest])
            assert rows in str(caught.value)
    flags = ("--adapter", str(place), "--prompt", ASKED, "--num_tokens", "6", "--raw")
    assert run("generate", *flags).stdout.strip() == answer_of(finished)
    assert not (place / "ran").exists()
    flags = ("--adapter", str(place), "--eval_samples=0", f"--eval_split={rows}")
    done = run("evaluate", *flags)
    assert "division by zero" in done.stderr and (place / "ran").exists()


def answer_of(finished):
    """The answer that training recorded at its end."""
    lines = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    return [line["answer"] for line in lines if line.get("event") == "sample"][-1]


def test_two_ranks_give_the_answer_of_the_trained_model_once(finished):
    """Reference: the answer that training recorded."""
    flags = ("--adapter", str(finished), "--prompt", ASKED, "--num_tokens", "6", "--raw")
    done = run("generate", *flags, "--world_size=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer_of(finished) != ""


def test_what_is_imported_for_long_is_shown(finished):
    """A line comes when it takes longer than LINE_S, as a bar does on a terminal."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    rank["MASTER_PORT"] = str(launch.find_port(None))
    asked = ["generate", f"--adapter={finished}", "--prompt=x", "--num_tokens=1"]
    rows, out = finished.parent / "rows.jsonl", finished.parent / "imports"
    trained = ["train", f"--model_name={BASE}", f"--dataset={rows}", "--max_steps=1"]
    for argv, env in (asked, {}), ([*trained, "--save_model=false", f"--output_dir={out}"], rank):
        program = f"from fsdp_qlora import __main__, cli\ncli.LINE_S = 0.1\n__main__.main({argv})"
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env)
        assert done.returncode == DONE and "imports libraries" in done.stderr, done.stderr
        assert ("imports torch" in done.stderr) == bool(env)


def test_a_conversation_is_drawn_by_its_seed_and_ends_with_an_empty_line(finished):
    flags = ("--adapter", str(finished), "--num_tokens", "6", "--raw", "--temperature", "9")
    done = run("generate", *flags, text=f"{ASKED}\nsay lo:\n{ASKED}\n\n")
    drawn = done.stdout.splitlines()
    assert drawn[0] == drawn[2] != answer_of(finished)
    assert len(drawn) == 3


def test_a_merged_model_answers_as_base_and_adapter(finished):
    """As it is stored, in 16 bit or more: nothing is quantised again."""
    merged = finished.parent / "merged"
    flags = ("--adapter", str(finished), "--out", str(merged), "--dtype=fp32", "--evidence_rows=0")
    assert commands.merge(list(flags)) == DONE
    base = tokenizer_files(finished.parent / "models--tests--tiny" / "snapshots" / REVISION)
    assert len(base) > 1 and tokenizer_files(finished) == tokenizer_files(merged) == base
    flags = ("--model_name", str(merged), "--precision=fp32", "--prompt", ASKED, "--raw")
    done = run("generate", *flags, "--num_tokens=6")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer_of(finished)
    losses = evaluated(finished, merged, "--precision=fp32")
    assert losses == pytest.approx([loss_of(finished, "after")], abs=2e-3)
    cfg = inference.config_of(None, ["--model_name", str(merged)])
    assert cfg.format_name == "bf16"
    assert inference.config_of(None, ["--train_type", "qlora"]).format_name == "nf4_dq"


def loss_of(finished, when):
    """Held-out loss that training recorded."""
    lines = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    (loss,) = (e["loss"] for e in lines if e.get("event") == "eval" and e["when"] == when)
    return loss


def evaluated(finished, model, *more):
    """Losses that `evaluate` prints of a model without an adapter, on the run's held-out rows."""
    rows = finished.parent / "rows.jsonl"
    flags = ("--model_name", str(model), f"--dataset={rows}", "--eval_samples=4", *more)
    done = run("evaluate", *flags)
    assert done.returncode == 0, done.stderr
    return [
        float(line.split()[2].rstrip(",")) for line in done.stdout.splitlines() if "loss" in line
    ]


def test_a_quantised_model_is_evaluated(finished):
    """As the run saw its base: the same 4 bit, made anew."""
    base, out = finished.parent / "models--tests--tiny" / "snapshots" / REVISION, finished.parent
    argv = ["--model_name", str(base), "--out", str(out / "nf4"), "--evidence_rows=0"]
    assert commands.quantize([*argv, "--device=cpu"]) == DONE
    losses = evaluated(finished, out / "nf4", "--precision=fp32")
    assert losses == pytest.approx([loss_of(finished, "before")], abs=2e-3)
    with pytest.raises(UserError, match="needs --adapter or --model_name"):
        inference.evaluate([])


def test_tasks_without_lm_eval_are_refused_in_one_line_and_with_it_both_models_are_scored(finished):
    """A task of four rows in local files; the trained model is to do better than the base."""
    flags = ("--adapter", str(finished), "--tasks=say", "--task_dir", str(finished / "task"))
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(UserError, match="needs lm-eval, which is not installed") as caught:
            inference.evaluate(list(flags))
        assert caught.value.code == ENVIRONMENT
        return
    (finished / "task").mkdir()
    rows = [{"prompt": row["prompt"], "target": i} for i, row in enumerate(ROWS[: len(WORDS)])]
    choices = [row["completion"] for row in ROWS[: len(WORDS)]]
    data = "".join(json.dumps({**row, "choices": choices}) + "\n" for row in rows)
    (finished / "task" / "say.jsonl").write_text(data)
    text = TASK.format(path=finished / "task" / "say.jsonl")
    (finished / "task" / "say.yaml").write_text(text)
    done = run("evaluate", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((finished / "tasks.json").read_text())
    base, adapter = (found[name]["say"]["acc,none"] for name in ("base", "adapter"))
    assert adapter > base


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_answer_ends_at_every_end_that_transformers_stops_at(tmp_path, name):
    """Llama 3, Gemma and Phi 3 have several; the tokenizer knows one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.save_model(tmp_path, vocab_size=384, initializer_range=0.3)
    tiny.save_tokenizer(tmp_path, [row["prompt"] for row in ROWS])
    (tmp_path / "generation_config.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    given = tokenizer(ASKED, return_tensors="pt").input_ids
    free = AutoModelForCausalLM.from_pretrained(tmp_path).generate(
        given, do_sample=False, max_new_tokens=9, eos_token_id=-1, pad_token_id=0
    )[0, given.shape[1] :]
    end = next(int(t) for i, t in enumerate(free) if i > 2 and t not in free[:i])
    table = json.loads((tmp_path / name).read_text()) if name == "config.json" else {}
    table["eos_token_id"] = [tokenizer.eos_token_id, end]
    (tmp_path / name).write_text(json.dumps(table))
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs = model.generate(given, do_sample=False, max_new_tokens=9, pad_token_id=0)[0]
    assert theirs[-1] == end and len(theirs) < given.shape[1] + 9
    found = complete_by(model, tokenizer, [given[0].tolist()], inference.Sampling(9))
    said = theirs[given.shape[1] : -1]
    assert found == [tokenizer.decode(said, skip_special_tokens=True).rstrip("\ufffd")]


def complete_by(model, tokenizer, rows, how):
    """`complete` of a model of transformers, on one rank."""

    class Ours:
        decoder = model.model

        def __call__(self, ids, cache, **padding):
            return model(ids, **cache, **padding).logits[:, -1:]

    world = SimpleNamespace(rank=0, device=model.device, from_first=lambda logits: logits)
    return inference.complete(Ours(), tokenizer, rows, how, world)


@pytest.mark.parametrize("word", ("past_key_values", "cache"))  # to 5.23, and from 5.24 on
def test_a_cache_goes_by_the_name_that_transformers_gives_it(monkeypatch, tmp_path, word):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, modeling_outputs

    def generate(self, ids_BT, **rest):
        seen.update(vars(self(ids_BT, **{word: "kept"})))
        return ids_BT

    class Model:
        decoder = AutoModelForCausalLM.from_pretrained(tiny.save_model(tmp_path)).model

        def __call__(self, ids, cache, **padding):
            seen["given"] = cache
            return self.decoder(ids).last_hidden_state

    seen, world = {}, SimpleNamespace(rank=0, device="cpu", from_first=lambda logits: logits)
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setattr(modeling_outputs, "CausalLMOutputWithPast", SimpleNamespace)
    tiny.save_tokenizer(tmp_path, [ASKED])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    inference.complete(Model(), tokenizer, [[1, 2]], inference.Sampling(3), world)
    assert seen["given"] == {word: "kept"} and seen[word] == "kept"


def test_tokens_are_drawn_as_transformers_draws_them(tmp_path):
    """Reference: its own `generate`, each from the same seed, row by row without padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.save_model(tmp_path, vocab_size=384, initializer_range=0.3)
    tiny.save_tokenizer(tmp_path, [row["prompt"] for row in ROWS])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    given, answers = tokenizer(ASKED, return_tensors="pt"), set()
    for seed, settings in enumerate(
        ({"temperature": 0.7}, {"top_p": 0.6}, {"repetition_penalty": 3.0}, {"temperature": 3.0})
    ):
        how = inference.Sampling(12, **{"temperature": 1.0, **settings}, seed=seed)
        torch.manual_seed(seed)
        theirs = model.generate(
            **given, do_sample=True, max_new_tokens=12, top_k=0, pad_token_id=0, **settings
        )[0, given.input_ids.shape[1] :]
        before = torch.get_rng_state()
        (ours,) = complete_by(model, tokenizer, given.input_ids.tolist(), how)
        assert torch.equal(torch.get_rng_state(), before)
        assert ours == tokenizer.decode(theirs, skip_special_tokens=True).rstrip("\ufffd")
        answers.add(ours)
    assert len(answers) == 4
    greedy = inference.Sampling(12)
    (whole,) = complete_by(model, tokenizer, given.input_ids.tolist(), greedy)
    first, second = whole[3:5], whole[5:7]
    assert all(text in whole for text in (first, second))
    for stop in (first, json.dumps([second, first])):
        how = dataclasses.replace(greedy, stop=stop)
        assert complete_by(model, tokenizer, given.input_ids.tolist(), how) == [
            whole[: whole.find(first)]
        ]
    assert inference.Sampling(stop="[INST]").stops == ["[INST]"]


@pytest.fixture
def opened(finished, monkeypatch):
    """The finished run, opened in this process; the commands find it open."""
    found = load_model(finished)
    monkeypatch.setattr(inference, "open_run", lambda *rest: found)
    yield found
    found.close()


def test_a_file_of_prompts_is_answered_in_its_order_as_one_by_one(
    opened, tmp_path, capsys, monkeypatch
):
    """In fp32, four at a time, padded for the kernel that has no masks, too."""
    from fsdp_qlora.model.attention import PLAIN

    rows = [{"prompt": f"{'s.a:y ' * (7 * i % 5)}l{'aoiu'[i % 4]}:", "id": i} for i in range(6)]
    rows[4] = {
        "messages": [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "x"}]
    }
    (tmp_path / "in.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    argv = ["--adapter", str(opened.adapter.path), "--num_tokens=6", "--raw"]
    files = ["--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    opened.model.decoder.config._attn_implementation = PLAIN
    assert inference.generate([*argv, *files]) == DONE
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{**row, "answer": None} for row in found] == [{**row, "answer": None} for row in rows]
    capsys.readouterr()
    for row in found:
        question = row.get("prompt", ASKED)
        inference.generate([*argv, "--prompt", question])
        assert capsys.readouterr().out.strip() == row["answer"].strip()
    assert len({row["answer"] for row in found}) > 2
    opened.info.config["max_position_embeddings"] = len(opened.encode(ASKED, True)) - 1
    opened.encode("l", True)
    assert not capsys.readouterr().out
    opened.encode(ASKED, True)
    assert f"made for {opened.info.config['max_position_embeddings']}\n" in capsys.readouterr().out
    written = (tmp_path / "out.jsonl").read_text()
    more = [*argv, *files[:2], "--max_new_tokens=6", "--batch_size=4", "--out"]
    assert inference.generate([*more, str(tmp_path / "new" / "out.jsonl")]) == DONE
    assert (tmp_path / "new" / "out.jsonl").read_text() == written
    assert os.listdir(tmp_path / "new") == ["out.jsonl"] and capsys.readouterr().err == ""
    monkeypatch.setattr(inference, "open_run", lambda *rest: pytest.fail("opened"))
    # Before anything is answered.
    for out in (tmp_path, tmp_path / "out.jsonl" / "x", tmp_path / "new" / ".." / "in.jsonl"):
        with pytest.raises(UserError, match=r"--out .*; give another"):
            inference.generate([*more, str(out)])
    for flags in (files[:2], files[2:], [*files, "--chat"]):
        with pytest.raises(UserError, match="FILE: go together, without --prompt"):
            inference.generate([*argv, *flags])
    with pytest.raises(UserError, match="must be above 0 to 1"):
        inference.generate([*argv, "--top_p=0"])


def test_the_template_gets_what_run_and_row_give_it(finished, tmp_path):
    """The same ids as by transformers."""
    from transformers import AutoTokenizer

    template = "{{ style }}{{ tools }}" + small_tokenizers.CHATML
    tokenizer = AutoTokenizer.from_pretrained(
        small_tokenizers.save(tmp_path / "m", "chatml", chat_template=template)
    )
    shutil.copytree(finished, tmp_path / "run")
    edit_json(tmp_path / "run" / "run_config.json", chat_template_kwargs='{"style": "::"}')
    cfg = inference.config_of(tmp_path / "run", [])
    info = arch.read("llama-2-7b", need_weights=False)
    opened = inference.Opened(cfg, info, None, None, None)
    opened.__dict__["tokenizer"] = tokenizer
    turns, tools = [{"role": "user", "content": ASKED}], [{"type": "function", "function": {}}]
    for own, row in [
        ({"style": "::"}, None),
        ({"style": "!!"}, {"chat_template_kwargs": {"style": "!!"}}),
        ({"style": "::", "tools": tools}, {"tools": json.dumps(tools)}),
    ]:
        wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, **own)
        assert opened.encode(ASKED, row=row) == wanted["input_ids"]
    with pytest.raises(UserError, match='field "chat_template_kwargs" is a list'):
        opened.encode(ASKED, row={"chat_template_kwargs": [1]})
    base, adapter = SimpleNamespace(path=tmp_path / "m"), SimpleNamespace(path=tmp_path / "run")
    for template, words in [  # of the adapter
        ("{{ 'a' * 10**9 }}", "writes more than 67,108,864 characters"),
        ("{{ raise_exception('no') }}", "cannot render .*: no"),
    ]:
        (adapter.path / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=words):
            inference.Opened(cfg, base, None, None, adapter).encode(ASKED)


def test_a_chat_has_commands(opened, tmp_path, capsys, monkeypatch):
    """What the model is given is what the conversation should be at that place."""
    asked, file = [], tmp_path / "chat.jsonl"
    monkeypatch.setattr(
        type(opened), "encode", lambda self, turns, raw: asked.append([*turns]) or [5, 6]
    )
    lines = ["/help", "a", f"/save {file}", "/system be short", f"/save {file}", "b", "/reset"]
    lines += ["c", f"/save {file}", f"/save {tmp_path}/none/x", "/quit", "d"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    argv = ["--adapter", str(opened.adapter.path), "--num_tokens=2", "--chat", "--prompt=first"]
    assert inference.generate(argv) == DONE
    said = [[turn["content"] for turn in turns if turn["role"] != "assistant"] for turns in asked]
    assert said == [["first"], ["first", "a"], ["be short", "b"], ["be short", "c"]]
    saved = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [[turn["role"] for turn in turns] for turns in saved] == [
        ["user", "assistant"] * 2,
        ["system", "user", "assistant"],
    ]
    out = capsys.readouterr().out
    assert "/save FILE" in out and "No such file or directory; give another file" in out


PARENTS = {
    "inference.spread('evaluate', [], config.parse(['--world_size=2']))": 2,
    "serving.run_tool(sys.argv[1])": 1,  # llama.cpp's
    "subprocess.run(sys.argv[2:])": 1,  # as torchrun does
}


@pytest.mark.parametrize("call", PARENTS)
def test_ranks_die_with_their_parent(finished, tmp_path, call):
    """Killed outright, it can end nobody: the kernel must."""
    words = ("-m", "fsdp_qlora", "generate", f"--adapter={finished}", "--prompt=a")
    meeting = socket.create_server(("127.0.0.1", 0))  # of a rank of torchrun, which waits there
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(meeting.getsockname()[1])}
    place |= {"TORCHELASTIC_RUN_ID": "7", "RANK": "1", "WORLD_SIZE": "2"}
    stub = tmp_path / "rank"
    stub.write_text("#!/bin/sh\nexec sleep 100\n")
    stub.chmod(0o755)
    parent = "import subprocess, sys; from fsdp_qlora import config, inference; "
    parent += "from fsdp_qlora.export import serving; sys.executable = sys.argv[1]; "
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | place
    command = [sys.executable, "-c", parent + call, str(stub), sys.executable, *words]
    process = subprocess.Popen(command, env=env)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    limit_s = time.monotonic() + 60
    while len(ranks := children.read_text().split()) < PARENTS[call] and time.monotonic() < limit_s:
        time.sleep(0.05)
    time.sleep(0.5)
    meeting.settimeout(60)
    if "argv[2:]" in call:
        meeting.accept()
    process.kill()
    process.wait()
    limit_s = time.monotonic() + 5
    while left := [rank for rank in ranks if psutil.pid_exists(int(rank))]:
        assert time.monotonic() < limit_s, left
        time.sleep(0.05)
    assert len(ranks) == PARENTS[call]
