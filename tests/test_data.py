"""From a configuration to the batches of a rank."""

import json
from types import SimpleNamespace

import pytest

from fsdp_qlora import config
from fsdp_qlora.data import build
from fsdp_qlora.errors import UserError
from tests.test_tokens import ROWS, make_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tokenizer and twelve rows."""
    path = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(path)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    return path


def run(place, *flags, rank=0, size=2, **model):
    cfg = config.parse(["--model_name", str(place), "--context_length", "96", *flags])
    info = SimpleNamespace(path=place, vocab_size=512, **model)
    return build(cfg, info, SimpleNamespace(rank=rank, size=size))


def test_a_file_of_rows_becomes_batches_with_held_out_rows_the_same_on_every_rank(place):
    flags = ["--dataset", str(place / "rows.jsonl"), "--eval_samples", "3", "--batch_size", "2"]
    flags += ["--sample_prompt", "Add.", "--num_epochs", "2"]
    ranks = [run(place, *flags, rank=rank) for rank in range(2)]
    assert [data.train.num_steps for data in ranks] == [6, 6]
    assert [len(data.held_out) for data in ranks] == [1, 1]
    first = ranks[0]
    assert str(first.audit).startswith("12 rows (3 held out)")
    trained = sum(
        batch.num_trained_tokens
        for data in ranks
        for batches in (*map(data.train.step, range(3)), data.held_out)
        for batch in batches
    )
    assert trained == first.audit.num_trained_tokens
    assert first.sample_prompt.endswith("### Instruction:\nAdd.\n\n### Response:\n")
    assert first.tokenizer.eos_token == "<eos>"


def test_dummy_rows_need_no_tokenizer(tmp_path):
    data = run(tmp_path, "--dataset", "dummy", "--dataset_samples", "6", size=1)
    assert data.tokenizer is None and data.sample_prompt is None and data.held_out == []
    assert data.train.num_steps == 6
    batch = data.train.step(0)[0]
    assert batch.input_ids.shape == (1, 96) and batch.num_trained_tokens == 95


def test_rows_of_text_without_a_tokenizer_are_an_error(place, tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        run(tmp_path, "--dataset", str(place / "rows.jsonl"))


def test_a_broken_tokenizer_is_an_error_in_one_line(place, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        run(tmp_path, "--dataset", str(place / "rows.jsonl"))
