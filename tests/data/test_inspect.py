"""The audit: what `python -m fsdp_qlora data` counts and shows."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdp_qlora import config
from fsdp_qlora.data import batches, prepare, tokenizer
from fsdp_qlora.errors import DONE, UserError
from tests import small_tokenizers
from tests.small_tokenizers import ROWS as REAL_ROWS

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 600,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model without weights: config.json and a tokenizer."""
    path = small_tokenizers.save(tmp_path_factory.mktemp("model"), "chatml")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(num):
    return [{"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(num)]


def facts(place, path, *flags, world_size=1):
    cfg = config.parse([f"--dataset={path}", *flags])
    ready = prepare.prepare(cfg, tokenizer.read(place), 600)
    return prepare.audit(cfg, ready, world_size, 8)


def test_the_users_example_has_their_numbers_of_steps(place, tmp_path):
    """10,748 rows, 8 a card, 3 epochs: 4,029 steps on one card and 2,013 on two."""
    path = write(tmp_path / "x.jsonl", rows(10_748))
    flags = ("--batch_size=2", "--gradient_accumulation_steps=4", "--num_epochs=3")
    found = facts(place, path, *flags, "--eval_split=none")
    assert found.facts["steps"] == {
        "1": {"per_epoch": 1343, "in_all": 4029},
        "2": {"per_epoch": 671, "in_all": 2013},
    }
    assert "1 GPU: 1,343 an epoch, 4,029 in total; 2 GPUs: 671 an epoch, 2,013 in total" in "".join(
        found.lines()
    )
    assert found.facts["num_train"] == 10_748 and found.facts["num_repeated"] == 0
    assert facts(place, path, "--max_steps=5", world_size=4).facts["steps"]["4"]["in_all"] == 5


@pytest.mark.parametrize("more", [(), ("--context_parallel=2", "--attn=sdpa")])
def test_steps_of_packed_rows_are_those_of_the_run(place, tmp_path, more):
    """The run's own batches, on every number of GPUs; each row once in an epoch."""
    path = write(tmp_path / "x.jsonl", rows(90))
    flags = ("--packing=on", "--context_length=128", "--batch_size=2", "--num_epochs=2.5")
    cfg = config.parse([f"--dataset={path}", *flags, *more])
    ready = prepare.prepare(cfg, tokenizer.read(place), 600)
    found = prepare.audit(cfg, ready, 3, 8).facts["steps"]
    for readers in (1, 2, 3):
        count = found[str(readers * cfg.context_parallel)]
        every = [
            batches.PackedBatches(ready.train, 128, batches.sampler_config(cfg, readers, rank, 8))
            for rank in range(readers)
        ]
        steps = range(count["per_epoch"])
        seen = [
            i for b in every for s in steps for m in b.micro_batches(s, b.sampler.rank) for i in m
        ]
        assert sorted(seen) == list(range(len(ready.train)))
        assert count["in_all"] == every[0].num_steps < 90
    assert facts(place, path, *flags, *more).facts["notes"] == []


def test_every_loss_is_counted_and_named(place, tmp_path):
    table = [*rows(3), {"prompt": "a", "completion": " "}, rows(1)[0], {"prompt": 1}]
    table += [{"prompt": "x" * 400, "completion": "y"}, {"prompt": "b", "completion": "z" * 400}]
    path = write(tmp_path / "x.jsonl", table)
    found = facts(place, path, "--context_length=64")
    expected = {
        "num_rows": 7,
        "kinds": {"prompt": 7},
        "num_bad": 1,
        "bad": [f"{path}:6: has fields prompt (want input_ids | messages | "],
        "num_empty": 1,
        "num_beyond": 1,
        "num_cut": 1,
        "num_repeated": 1,
        "num_train": 5,
        "num_learning_end": 4,
    }
    found.facts["bad"] = [fault[: len(expected["bad"][0])] for fault in found.facts["bad"]]
    assert {name: found.facts[name] for name in expected} == expected
    assert found.facts["examples"] == {
        "cut": [f"{path}:8"],
        "empty": [f"{path}:4"],
        "beyond": [f"{path}:7"],
        "repeated": [f"{path}:5 repeats {path}:1"],
    }
    text = "\n".join(found.lines())
    assert f"empty     1 rows have nothing to learn and are left out: {path}:4" in text
    assert "end       the end of text is learned in 80.0% of the rows" in text
    assert "more than a tenth of the rows is cut" in text


def test_lengths_and_tokens_add_up(place):
    found = facts(place, REAL_ROWS / "chitchat.jsonl", "--context_length=128").facts
    ready = prepare.prepare(
        config.parse([f"--dataset={REAL_ROWS / 'chitchat.jsonl'}", "--context_length=9999"]),
        tokenizer.read(place),
        600,
    )
    lengths = sorted(len(sample.input_ids) for sample in ready.train)
    assert found["longest_uncut_tokens"] == lengths[-1] > 128
    assert found["median_tokens"] == int((lengths[2] + lengths[3]) / 2)
    assert found["num_tokens"] == sum(min(length, 128) for length in lengths)
    assert found["num_tokens_cut"] == sum(lengths) - found["num_tokens"]
    assert found["kinds"] == {"chat": 6} and found["epoch_tokens"] == found["num_tokens"]


def test_padding_is_less_when_rows_are_packed(place, tmp_path):
    table = [{"prompt": "a", "completion": "word " * (1 + 7 * i % 60)} for i in range(300)]
    path = write(tmp_path / "x.jsonl", table)
    share = facts(place, path, "--batch_size=8", "--context_length=512").facts["padding_share"]
    assert 0 < share["packed"] < share["batches"] < 0.2


def test_held_out_rows_that_are_also_learned_are_told(place, tmp_path):
    train, held_out = write(tmp_path / "x.jsonl", rows(9)), write(tmp_path / "y.jsonl", rows(3))
    found = facts(place, train, f"--eval_split={held_out}", "--batch_size=16")
    assert found.facts["num_leaked"] == 3
    assert found.facts["notes"] == [
        "9 rows do not fill a step of 16",
        "3 held-out rows are also learned",
    ]


def test_an_end_that_is_never_learned_is_told(tmp_path):
    """The template ends answers with another token than the tokenizer's end of text."""
    light = small_tokenizers.save(tmp_path, "chatml", eos_token="<|endoftext|>")
    notes = facts(light, REAL_ROWS / "chitchat.jsonl", "--context_length=4096").facts["notes"]
    assert notes == ["the end of text is never learned: answers will not stop by it"]


def test_what_the_chat_template_makes_of_rows_is_told(place, tmp_path):
    """None: a plain one is used. One that leaves out of earlier turns what they thought."""
    path = REAL_ROWS / "chitchat.jsonl"
    plain = small_tokenizers.save(tmp_path / "plain", "plain")
    (note,) = facts(plain, path, "--context_length=4096").facts["notes"]
    assert note.startswith("the tokenizer has no chat template: '### Human")
    jinja = tmp_path / "t.jinja"
    jinja.write_text(
        "{% for m in messages %}{{ (m.role if loop.last else m.role | upper) + ':' + m.content }}"
        "{% endfor %}{{ 'assistant:' if add_generation_prompt }}"
    )
    found = facts(place, path, "--context_length=4096", f"--template={jinja}").facts
    num_answers = sum(line.count('"assistant"') for line in path.read_text().splitlines())
    assert found["num_train"] == num_answers > found["num_rows"] == 6
    assert found["notes"][-1].startswith(f"6 rows give {num_answers} samples")


def run(place, *flags, **env):
    command = [sys.executable, "-X", "importtime", "-m", "fsdp_qlora", "data"]
    command += [f"--model_name={place}", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=60
    )
    lines = done.stderr.splitlines(keepends=True)
    modules = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    err = "".join(line for line in lines if not line.startswith("import time"))
    return done.returncode, done.stdout, err, modules


def test_the_command_needs_no_torch_and_shows_what_is_learned(place):
    began = time.monotonic()
    path = REAL_ROWS / "chitchat.jsonl"
    code, out, err, modules = run(place, f"--dataset={path}", "--rows=1", "--context_length=999")
    assert (code, err) == (0, "") and time.monotonic() - began < 30
    assert "json" in modules and not modules & {"torch", "datasets", "pyarrow"}
    assert out.startswith(f"rows      6 of {path} (6 chat)\n")
    shown = out[out.index(f"{path}:") :].partition("\n")[2].partition("\n\n")[0]
    chat = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    whole = tokenizer.read(place).chat()
    texts = {whole.whole(messages) + "\n" for messages in chat}
    assert shown.replace("⟦", "").replace("⟧", "") in texts
    assert "<|im_start|>assistant\n⟦" in shown and "<|im_end|>\n⟧<|im_start|>user" in shown


def test_the_verb_gives_json_and_ends_with_an_error_for_bad_rows(place, tmp_path):
    path = write(tmp_path / "x.jsonl", [*rows(2), {"prompt": "\x1b[31m"}, 7])
    code, out, err, _ = run(place, f"--dataset={path}", "--json")
    assert json.loads(out)["num_bad"] == 2 and code == 2
    assert err.startswith(f"error: {path}:3: has fields prompt (want") and err.count("\n") == 1
    assert f" | {path}:4: is a number" in err


def test_dummy_rows_have_an_audit_too(place):
    code, out, _, _ = run(place, "--dataset=dummy", "--dataset_samples=5")
    assert code == 0 and "5 to learn" in out


def test_terminal_codes_of_the_data_are_not_sent_to_the_terminal(place, tmp_path, capsys):
    row = {"prompt": "a\x1b]0;title\x07", "completion": "b\x1b[2J" + "c" * 5000}
    path = write(tmp_path / "x.jsonl", [row])
    argv = [f"--model_name={place}", f"--dataset={path}", "--context_length=9999"]
    assert prepare.main(argv) == DONE
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[2J" in out and "characters ...]" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rows=x"], "--rows x: must be a whole number"),
        (["--rowz=1"], "no such option"),
        (["--model_name=llama-2-7b"], "has no tokenizer"),
    ],
)
def test_wrong_options_are_refused(tmp_path, argv, words):
    path = write(tmp_path / "x.jsonl", rows(2))
    with pytest.raises(UserError, match=words):
        prepare.main([f"--dataset={path}", *argv])


def test_columns_that_nothing_uses_are_named_in_one_line(place, tmp_path):
    chat = [{"role": "user", "content": "Hi", "train": True}, {"role": "gpt", "content": "Oh."}]
    given = [
        {"messages": chat, "id": 1, "tools": None},
        {"messages": chat, "id": 2, "lang\n": "de"},
    ]
    path = write(tmp_path / "x.jsonl", given)
    used = "id (4 rows), train of user messages (4 rows), lang\\n (2 rows)"
    found = facts(place, path, f"--eval_split={path}")
    assert f"note      nothing uses these columns: {used}" in found.lines()
    assert found.facts["unused"] == {"id": 4, "train of user messages": 4, "lang\n": 2}
    (path := tmp_path / "y.jsonl").write_text(json.dumps({"messages": chat[1:], "id": None}))
    assert "nothing uses" not in "".join(facts(place, path).lines())
