"""Token ids: what is masked, what is trained, what is counted."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fsdp_qlora.data import templates, tokens
from fsdp_qlora.errors import UserError

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue is a colour."},
    {"instruction": "Add.", "input": "2 + 2", "output": "4"},
    {"instruction": "Say it twice.", "input": "ho", "output": "ho ho"},
]


def make_tokenizer(adds_bos=False, eos="<eos>", pad="<eos>"):
    """A byte-level BPE tokenizer trained on the rows, with pad equal to eos as in many models."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(["".join(templates.render(row)) for row in ROWS], trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token=eos, pad_token=pad
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("adds_bos", [False, True])
def test_what_is_trained_reads_as_the_completion_and_the_end(adds_bos):
    tokenizer = make_tokenizer(adds_bos)
    samples, audit = tokens.tokenize(ROWS, tokenizer, 512, 512)
    assert audit.num_rows == len(samples) == 3 and audit.num_cut == audit.num_dropped == 0
    for row, sample in zip(ROWS, samples, strict=True):
        prompt = tokenizer.decode(sample.input_ids[: sample.num_prompt_tokens])
        trained = tokenizer.decode(sample.input_ids[sample.num_prompt_tokens :])
        assert prompt == "<bos>" * adds_bos + templates.render(row)[0]
        assert trained == row["output"] + "<eos>"
        assert sample.input_ids[-1] == tokenizer.eos_token_id


def test_a_token_that_straddles_prompt_and_completion_is_trained(tokenizer):
    words = (t for t in sorted(tokenizer.get_vocab()) if t.isascii() and t.isalpha())
    joined = next(t for t in words if len(t) > 3 and len(tokenizer(t)["input_ids"]) == 1)
    (sample,), _ = tokens.tokenize(
        [{"prompt": joined[:2], "completion": joined[2:]}], tokenizer, 512, 512
    )
    assert sample.input_ids.tolist() == [tokenizer.get_vocab()[joined], tokenizer.eos_token_id]
    assert sample.num_prompt_tokens == 0


def test_plain_text_is_trained_from_its_second_token_on_or_after_the_bos(tokenizer):
    row = [{"text": "a colour"}]
    (sample,), _ = tokens.tokenize(row, tokenizer, 512, 512)
    assert sample.num_prompt_tokens == 0
    assert sample.num_trained_tokens == len(sample.input_ids) - 1
    (sample,), _ = tokens.tokenize(row, make_tokenizer(adds_bos=True), 512, 512)
    assert sample.num_prompt_tokens == 1
    assert sample.num_trained_tokens == len(sample.input_ids) - 1


def test_a_row_longer_than_the_context_is_cut_counted_and_does_not_end(tokenizer):
    row = {"prompt": "Add.", "completion": "twice " * 50}
    (sample,), audit = tokens.tokenize([row], tokenizer, 16, 512)
    assert len(sample.input_ids) == 16 and tokenizer.eos_token_id not in sample.input_ids
    assert (audit.num_cut, audit.num_dropped, audit.longest_tokens) == (1, 0, 16)


def test_a_row_that_fits_exactly_is_not_cut(tokenizer):
    (whole,), _ = tokens.tokenize(ROWS[:1], tokenizer, 512, 512)
    length = len(whole.input_ids)
    (sample,), audit = tokens.tokenize(ROWS[:1], tokenizer, length, 512)
    assert audit.num_cut == 0 and len(sample.input_ids) == length
    (sample,), audit = tokens.tokenize(ROWS[:1], tokenizer, length - 1, 512)
    assert audit.num_cut == 1 and len(sample.input_ids) == length - 1


def test_rows_without_a_trained_token_are_dropped_and_counted(tokenizer):
    long_prompt = {"prompt": "Name " * 100, "completion": "x"}
    no_answer = {"prompt": "Add.", "completion": " \n"}
    good = {"prompt": "Add.", "completion": "4"}
    samples, audit = tokens.tokenize([long_prompt, good, no_answer], tokenizer, 32, 512)
    assert len(samples) == 1 and tokenizer.decode(samples[0].input_ids) == "Add.4<eos>"
    assert (audit.num_rows, audit.num_cut, audit.num_dropped) == (3, 0, 2)


def test_no_row_left_is_an_error(tokenizer):
    with pytest.raises(UserError, match="2 rows: none has an answer within 4 tokens"):
        tokens.tokenize(ROWS[:2], tokenizer, 4, 512)


def test_an_id_outside_the_embedding_is_an_error(tokenizer):
    largest = max(max(tokenizer(r["output"])["input_ids"]) for r in ROWS[:1])
    with pytest.raises(UserError, match=r"token id .* embedding has"):
        tokens.tokenize(ROWS, tokenizer, 512, largest)


def test_a_tokenizer_without_eos_is_an_error():
    with pytest.raises(UserError, match="no end-of-text token"):
        tokens.tokenize(ROWS, make_tokenizer(eos=None, pad=None), 512, 512)


def test_the_audit_counts_tokens_and_says_so_in_one_line(tokenizer):
    samples, audit = tokens.tokenize(ROWS, tokenizer, 70, 512)
    assert audit.num_tokens == sum(len(s.input_ids) for s in samples)
    assert audit.num_trained_tokens == sum(len(s.input_ids) - s.num_prompt_tokens for s in samples)
    assert str(audit).startswith("3 rows; ") and "\n" not in str(audit)
    assert f"{audit.num_trained_tokens:,} of them trained" in str(audit)


def test_dummy_rows_are_full_trained_within_the_vocabulary_and_set_by_the_seed():
    rows = tokens.dummy_samples(5, 24, 100, seed=1)
    ids = np.stack([row.input_ids for row in rows])
    assert ids.shape == (5, 24) and ids.min() >= 0 and ids.max() < 100
    assert [row.num_trained_tokens for row in rows] == [23] * 5
    again = np.stack([row.input_ids for row in tokens.dummy_samples(5, 24, 100, seed=1)])
    other = np.stack([row.input_ids for row in tokens.dummy_samples(5, 24, 100, seed=2)])
    assert (ids == again).all() and (ids != other).any()


def test_a_split_parts_the_rows_and_depends_on_nothing_but_the_seed():
    rows = tokens.dummy_samples(20, 4, 100, seed=0)
    train, held_out = tokens.split(rows, 6, seed=3)
    assert len(train) == 14 and len(held_out) == 6
    assert {id(r) for r in train} | {id(r) for r in held_out} == {id(r) for r in rows}
    assert [id(r) for r in tokens.split(rows, 6, seed=3)[1]] == [id(r) for r in held_out]
    assert [id(r) for r in tokens.split(rows, 6, seed=4)[1]] != [id(r) for r in held_out]


def test_a_split_that_leaves_nothing_to_train_on_is_an_error():
    with pytest.raises(UserError, match="at most 3"):
        tokens.split(tokens.dummy_samples(4, 4, 10, seed=0), 4, seed=0)
