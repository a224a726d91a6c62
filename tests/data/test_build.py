"""From a configuration to the batches of a rank."""

import json
from types import SimpleNamespace

import pytest
import torch

from fsdp_qlora import config
from fsdp_qlora.data import build
from tests import small_tokenizers
from tests.data.test_tokens import ROWS
from tests.small_tokenizers import ROWS as REAL_ROWS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a tokenizer and twelve rows."""
    path = small_tokenizers.save(tmp_path_factory.mktemp("model"), "plain")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 4))
    return path


def run(place, *flags, rank=0, size=2, device=CPU):
    cfg = config.parse(["--model_name", str(place), "--context_length", "256", *flags])
    info = SimpleNamespace(path=place, vocab_size=600)
    return build(cfg, info, SimpleNamespace(rank=rank, size=size, device=device))


def test_a_file_of_rows_becomes_batches_with_held_out_rows_the_same_on_every_rank(place):
    flags = ["--dataset", str(place / "rows.jsonl"), "--eval_samples", "3", "--batch_size", "2"]
    flags += ["--sample_prompt", "Add.", "--num_epochs", "2"]
    ranks = [run(place, *flags, rank=rank) for rank in range(2)]
    assert [data.train.num_steps for data in ranks] == [4, 4]
    assert [len(data.held_out) for data in ranks] == [1, 1]
    first = ranks[0]
    assert str(first.audit).startswith("12 rows (3 held out)")
    trained = sum(
        batch.num_trained_tokens
        for data in ranks
        for batches in (*map(data.train.step, range(2)), data.held_out)
        for batch in batches
    )
    assert trained == first.audit.facts["num_trained_tokens"]
    (prompt,) = first.prompts
    text = first.tokenizer.decode(prompt.ids)
    assert text.endswith("### Instruction:\nAdd.\n\n### Response:\n") and prompt.shown == "Add."
    assert first.tokenizer.eos_token == "</s>" and first.tokenizer.chat_template is None
    assert json.loads(json.dumps(first.audit.facts)) == first.audit.facts


def test_chats_are_asked_in_their_template_which_is_saved_with_the_tokenizer(place, tmp_path):
    """The plain tokenizer has no template: one is given to it; one that has its own keeps it."""
    llama = small_tokenizers.save(tmp_path / "llama3", "llama3")
    flags = [f"--dataset={REAL_ROWS / 'chitchat.jsonl'}", "--sample_prompt=Hi", "--world_size=1"]
    data = run(place, *flags, size=1)
    assert data.tokenizer.decode(data.prompts[0].ids) == "### Human: Hi\n### Assistant:"
    chat = [{"role": "user", "content": "Hi"}]
    asked = data.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert asked == data.tokenizer.decode(data.prompts[0].ids)
    data = run(llama, *flags, size=1)
    assert data.tokenizer.chat_template == small_tokenizers.LLAMA3
    ids = list(data.prompts[0].ids)
    asked = data.tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert ids == asked["input_ids"] and ids.count(data.tokenizer.bos_token_id) == 1


def test_a_card_gets_fewer_widths(place):
    flags = ["--dataset", str(place / "rows.jsonl")]
    plain, card = run(place, *flags), run(place, *flags, device=torch.device("cuda"))
    widths = [
        {b.input_ids.shape[1] for step in range(6) for b in data.train.step(step)}
        for data in (plain, card)
    ]
    longest = -(-plain.train.longest // 8) * 8
    assert len(widths[1]) < len(widths[0]) == 3 and max(widths[0]) == longest
    assert all(width % 64 == 0 or width == longest for width in widths[1])


def test_dummy_rows_need_no_tokenizer(tmp_path):
    data = run(tmp_path, "--dataset", "dummy", "--dataset_samples", "6", size=1)
    assert data.tokenizer is None and data.prompts == () and data.held_out == []
    assert data.train.num_steps == 6
    batch = data.train.step(0)[0]
    assert batch.input_ids.shape == (1, 256) and batch.num_trained_tokens == 255
