"""Parts of the rows, and when kept tokens are used again."""

import json

import numpy as np
import pytest

from fsdp_qlora import config
from fsdp_qlora.data import prepare, tokenizer
from fsdp_qlora.errors import UserError
from tests import small_tokenizers


def rows(num, first=0):
    return [{"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(first, num)]


def write(path, table):
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_tokenizers.save(tmp_path_factory.mktemp("model"))


def run(place, dataset, *flags, vocab_size=600, light=None):
    cfg = config.parse(["--dataset", str(dataset), "--token_cache=off", *map(str, flags)])
    light = light or tokenizer.read(place)
    return prepare.prepare(cfg, light, vocab_size)


def lines(part):
    return [part.place(i).number for i in range(len(part))]


def test_shares_part_the_rows_as_the_seed_says(place, tmp_path):
    path = write(tmp_path / "x.jsonl", rows(1000))
    ready = run(place, path, "--train_split=0.8", "--eval_split=0.1")
    train, held_out = lines(ready.train), lines(ready.held_out)
    assert len(train) + len(held_out) + ready.num_test == 1000
    assert not set(train) & set(held_out) and train == sorted(train)
    assert abs(len(train) - 800) < 40 and abs(len(held_out) - 100) < 30 and ready.num_test > 60
    other = run(place, path, "--train_split=0.8", "--eval_split=0.1", "--seed=7")
    assert lines(other.held_out) != held_out
    only = run(place, path, "--eval_split=0.1")
    assert only.num_test == 0 and len(only.train) + len(only.held_out) == 1000
    rest = run(place, path, "--train_split=0.9")
    assert rest.num_test == 0 and len(rest.train) + len(rest.held_out) == 1000


def test_rows_that_are_added_change_no_part_of_the_others(place, tmp_path):
    before = run(place, write(tmp_path / "x.jsonl", rows(300)), "--eval_split=0.2")
    after = run(place, write(tmp_path / "x.jsonl", rows(900)), "--eval_split=0.2")
    assert lines(before.held_out) == [line for line in lines(after.held_out) if line <= 300]
    assert lines(before.train) == [line for line in lines(after.train) if line <= 300]
    mixed = rows(300)[::-1]
    again = run(place, write(tmp_path / "x.jsonl", mixed), "--eval_split=0.2")
    assert sorted(301 - line for line in lines(again.held_out)) == lines(before.held_out)


def test_equal_rows_fall_into_one_part(place, tmp_path):
    ready = run(place, write(tmp_path / "x.jsonl", rows(200) * 2), "--eval_split=0.3")
    held_out = lines(ready.held_out)
    first = [line for line in held_out if line <= 200]
    assert held_out == first + [line + 200 for line in first]


def test_shares_are_even_over_many_hashes():
    hashes = np.random.default_rng(0).integers(0, 2**63, 100_000, np.uint64)
    for seed in (0, 42, 2**32 - 1):
        counts, _ = np.histogram(prepare.spread(hashes, seed), 10, (0, 1))
        assert counts.sum() == 100_000 and abs(counts - 10_000).max() < 500
    assert (prepare.spread(hashes, 1) != prepare.spread(hashes, 2)).all()


def test_a_number_of_rows_is_held_out_exactly(place, tmp_path):
    path = write(tmp_path / "x.jsonl", rows(50))
    ready = run(place, path, "--eval_samples=7")
    assert (len(ready.held_out), len(ready.train), ready.num_test) == (7, 43, 0)
    assert sorted(lines(ready.train) + lines(ready.held_out)) == list(range(1, 51))
    with pytest.raises(UserError, match="at most 49"):
        run(place, path, "--eval_samples=50")


def test_a_file_of_its_own_is_held_out(place, tmp_path):
    train, held_out = write(tmp_path / "x.jsonl", rows(9)), write(tmp_path / "y.jsonl", rows(3))
    ready = run(place, train, f"--eval_split={held_out}")
    assert (len(ready.train), len(ready.held_out), ready.num_test) == (9, 3, 0)
    assert str(ready.held_out.place(0)) == f"{held_out}:1"
    ready = run(place, train, f"--eval_split={held_out}", "--train_split=0.5")
    assert len(ready.train) + ready.num_test == 9 and len(ready.held_out) == 3


OWN = """
def get_custom_dataset(dataset_config, tokenizer, split):
    text = {"train": "abc", "validation": "d"}[split]
    ids = [tokenizer(letter)["input_ids"] + [tokenizer.eos_token_id] for letter in text]
    return [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
"""


def test_a_function_of_the_users_own_gives_both_splits(place, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    ready = run(place, tmp_path / "own.py", "--eval_split=validation")
    assert (len(ready.train), len(ready.held_out)) == (3, 1)
    light = tokenizer.read(place)
    assert light.core.decode(ready.held_out[0].input_ids.tolist(), False) == "d</s>"
    with pytest.raises(UserError, match=r"own.py:3: KeyError: 'train2'"):
        run(place, tmp_path / "own.py", "--train_split=train2")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--eval_samples=1", "--train_split=0.5"], "both split the rows"),
        (["--eval_split=0.0001"], "0.0001 of 5 rows is none"),
    ],
)
def test_parts_that_cannot_be_are_refused(place, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        run(place, write(tmp_path / "x.jsonl", rows(5)), *flags)


def kept(cache):
    return sorted(path.name for path in cache.glob("tokens-*"))


def test_kept_tokens_are_used_for_the_same_data_and_settings_only(place, tmp_path):
    path, cache = write(tmp_path / "x.jsonl", rows(20)), tmp_path / "cache"
    flags = (f"--token_cache={cache}", "--context_length=64")

    def note(*more, **other):
        return run(place, path, *flags, *more, **other).stores[0].note

    assert note() == str(cache / kept(cache)[0])
    assert note("--seed=5", "--eval_split=0.5") == f"{cache / kept(cache)[0]} (made before)"
    jinja = tmp_path / "t.jinja"
    for number, change in enumerate(
        [
            lambda: note("--context_length=65"),
            lambda: note("--train_on=all"),
            lambda: note("--system_prompt=S"),
            lambda: note("--allow_dropped_text"),
            lambda: note("--template=chat"),
            lambda: note("--template={prompt}{completion}"),
            lambda: jinja.write_text("{{ prompt }}") and note(f"--template={jinja}"),
            lambda: jinja.write_text("{{ prompt}} ") and note(f"--template={jinja}"),
            lambda: write(path, rows(21)) and note(),
            lambda: note(light=small_tokenizers.make(tmp_path / "other", adds_bos=True)),
        ],
        2,
    ):
        assert "made before" not in change() and len(kept(cache)) == number
    write(path, rows(20))
    assert note().endswith("(made before)")
    with pytest.raises(UserError, match="embedding has 300 rows"):
        note(vocab_size=300)


def test_small_data_is_not_kept_unless_asked_for_and_bad_rows_never(place, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_QLORA_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "x.jsonl", rows(20))
    assert run(place, path, "--token_cache=auto").stores[0].note == ""
    monkeypatch.setattr(prepare, "FEWEST_KEPT_BYTES", 10)
    assert str(tmp_path / "cache") in run(place, path, "--token_cache=auto").stores[0].note
    write(path, [*rows(20), 7])
    run(place, path, "--token_cache=auto")
    assert len(kept(tmp_path / "cache")) == 1


def test_kept_tokens_are_those_of_memory(place, tmp_path):
    flags = ("--eval_split=0.3", "--template=chat", "--train_on=last")
    path = small_tokenizers.ROWS / "chitchat.jsonl"
    memory = run(place, path, *flags)
    for _ in range(2):
        disk = run(place, path, *flags, f"--token_cache={tmp_path}")
        for ours, theirs in ((disk.train, memory.train), (disk.held_out, memory.held_out)):
            assert lines(ours) == lines(theirs) and len(ours)
            for a, b in zip(ours, theirs, strict=True):
                assert a.input_ids.tolist() == b.input_ids.tolist()
                assert a.is_trained.tolist() == b.is_trained.tolist()
        assert disk.stores[0].facts == json.loads(json.dumps(memory.stores[0].facts))
