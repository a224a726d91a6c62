"""Token ids: what is masked, what is learned, what is counted."""

from pathlib import Path

import numpy as np
import pytest

from fsdp_qlora.data import row_formats, sources, tokens
from fsdp_qlora.data.sources import RowPlace, TextPiece
from fsdp_qlora.data.tokens import StoreBuilder, TokenDataset
from tests import small_tokenizers

ROWS = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue is a colour."},
    {"instruction": "Add.", "input": "2 + 2", "output": "4"},
    {"instruction": "Say it twice.", "input": "ho", "output": "ho ho"},
]
END = "</s>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizers.make(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory):
    return small_tokenizers.make(tmp_path_factory.mktemp("bos"), adds_bos=True)


def fill(rows, tokenizer, context_length=512, template=None, **how) -> TokenDataset:
    """Samples of rows; their places are lines of x."""
    formatter = row_formats.choose(template, tokenizer.chat(), **how)
    placed = ((RowPlace("x", number), row) for number, row in enumerate(rows, 1))
    return TokenDataset(
        tokens.tokenize(StoreBuilder(None), placed, formatter, tokenizer, context_length)
    )


def learned(part, tokenizer):
    """What is given and what is learned of every sample, as text."""
    return [
        tuple(
            tokenizer.core.decode(s.input_ids[s.is_trained == flag].tolist(), False)
            for flag in (False, True)
        )
        for s in part
    ]


@pytest.mark.parametrize("start", ["", "<s>"])
def test_what_is_trained_reads_as_the_completion_and_the_end(start, tokenizer, with_bos):
    chosen = with_bos if start else tokenizer
    part = fill(ROWS, chosen)
    facts = part.store.facts
    assert facts["num_rows"] == len(part) == 3 and facts["num_cut"] == facts["num_empty"] == 0
    assert facts["num_learning_end"] == facts["num_with_end"] == 3
    assert learned(part, chosen) == [
        (start + small_tokenizers.pair(row)[0], row["output"] + END) for row in ROWS
    ]


def test_a_token_that_straddles_prompt_and_completion_is_trained(tokenizer):
    words = (t for t in sorted(tokenizer.core.get_vocab()) if t.isascii() and t.isalpha())
    joined = next(t for t in words if len(t) > 3 and len(tokenizer.core.encode(t).ids) == 1)
    (sample,) = fill([{"prompt": joined[:2], "completion": joined[2:]}], tokenizer)
    assert sample.input_ids.tolist() == [tokenizer.core.token_to_id(joined), tokenizer.eos_id]
    assert sample.is_trained.tolist() == [True, True] and sample.num_trained_tokens == 1


def test_characters_of_several_tokens_are_trained_whole(tokenizer):
    rows = [{"prompt": "a 😀漢", "completion": "字😀"}, {"prompt": "é", "completion": " é é"}]
    expected = [("a 😀漢", "字😀" + END), ("é", " é é" + END)]
    assert learned(fill(rows, tokenizer), tokenizer) == expected


@pytest.mark.parametrize("space", ["", " ", "\n"])
def test_ends_and_beginnings_written_in_the_text_are_not_doubled(space, tokenizer, with_bos):
    """In pairs, running text, and chats whose template adds them too."""
    row = {"prompt": "<s>Sky? ", "completion": f"Blue.{END}{space}"}
    assert learned(fill([row], with_bos), with_bos) == [("<s>Sky? ", f"Blue.{END}")]
    assert learned(fill([row], tokenizer), tokenizer) == [("<s>Sky? ", f"Blue.{END}")]
    row = {"prompt": f"{space}<s><s>{space}Sky? ", "completion": f"Blue.{END}{END}"}
    given = f"<s>{space}Sky? "
    assert learned(fill([row], with_bos), with_bos) == [(given, f"Blue.{END}")]
    texts = [f"<s>One.{space}{END}", "Two.", f"<s>{END}{END} Three.{END}"]
    part = fill([{"text": text} for text in texts], with_bos)
    ids = [number for sample in part for number in sample.input_ids.tolist()]
    written = f"<s>One.{space}{END}<s>Two.{END}<s>{END}{END} Three.{END}"
    assert with_bos.core.decode(ids, False) == written
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
    path = Path(tokenizer.place) / "t.jinja"
    path.write_text(template + "{{ eos_token }}{% endif %}{% endfor %}")
    pair = [{"role": "user", "content": "<s>Sky?"}, {"role": "assistant", "content": f"B.{space}"}]
    answer = pair[1] | {"content": f"Blue.{END}{space}"}
    ((given, said),) = learned(
        fill([{"messages": [*pair, pair[0], answer]}], with_bos, template=str(path)), with_bos
    )
    assert (given, said) == ("<s>Sky?<s>Sky?", f"B.{space}{END}Blue.{END}")


def test_a_row_longer_than_the_context_is_cut_counted_and_does_not_end(tokenizer):
    whole = fill(ROWS, tokenizer)
    length = len(whole[0].input_ids) - 2
    part = fill(ROWS[:1], tokenizer, length)
    facts = part.store.facts
    assert (facts["num_cut"], facts["num_learning_end"], len(part)) == (1, 0, 1)
    assert part[0].input_ids.tolist() == whole[0].input_ids[:length].tolist()
    assert part.store.table[:-1, tokens.NUM_UNCUT].tolist() == [length + 2]
    assert facts["examples"] == {"cut": ["x:1"]}


def test_rows_with_nothing_to_learn_are_left_out_counted_and_named(tokenizer):
    rows = [ROWS[0], ROWS[1] | {"output": "  "}, {"input_ids": [1, 2], "labels": [1, -100]}]
    rows += [{"messages": [{"role": "user", "content": "Hi"}]}, {"input_ids": []}]
    facts = fill(rows, tokenizer).store.facts
    assert (facts["num_rows"], facts["num_empty"], facts["num_beyond"]) == (5, 4, 0)
    assert facts["examples"] == {"empty": ["x:2", "x:3", "x:4", "x:5"]}
    prompt_tokens = len(tokenizer.core.encode(small_tokenizers.pair(ROWS[0])[0]).ids)
    facts = fill(ROWS[:1], tokenizer, prompt_tokens).store.facts
    assert (facts["num_empty"], facts["num_beyond"], facts["num_cut"]) == (0, 1, 0)


def test_running_text_becomes_blocks_that_together_are_the_text(tokenizer, with_bos):
    """Real text: pages of Python's help, as files and as rows, an end after each."""
    from pydoc_data.topics import topics

    pages = [text.replace("\r", "").rstrip("\n") for text in list(topics.values())[:6]]
    for chosen, start in ((tokenizer, ""), (with_bos, "<s>")):
        whole = "".join(f"{start}{page}{END}" for page in pages)
        ids = [
            i
            for page in pages
            for i in chosen.core.encode(start + page + END, None, False, False).ids
        ]
        for rows in ([{"text": page} for page in pages], [TextPiece(page, True) for page in pages]):
            size = 129 if len(ids) % 128 == 1 else 128  # a token alone has nothing to learn
            part = fill(rows, chosen, size)
            lengths = part.lengths.tolist()
            assert lengths[:-1] == [size] * (len(part) - 1) and 1 < lengths[-1] <= size
            found = np.concatenate([sample.input_ids for sample in part]).tolist()
            assert found == ids and chosen.core.decode(found, False) == whole
            given = np.concatenate([~sample.is_trained for sample in part])
            bos_id = chosen.core.token_to_id("<s>")
            assert given.tolist() == [bool(start) and i == bos_id for i in found]
            (all_but_one,) = fill(rows, chosen, len(ids) - 1)
            assert all_but_one.input_ids.tolist() == ids[:-1]


def test_a_text_file_read_in_pieces_gives_the_tokens_of_the_whole(tmp_path, tokenizer):
    from pydoc_data.topics import topics

    text = "".join(topics.values()).replace("\r", "")[:200_000]
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    pieces = [row for _, row in sources.read_file(tmp_path / "x.txt")]
    assert len(pieces) > 2
    found = np.concatenate([sample.input_ids for sample in fill(pieces, tokenizer)])
    (whole,) = tokenizer.encode([text + END], adds_special=False)
    assert found.tolist() == whole.ids


def test_rows_that_are_lines_of_a_text_run_on_until_the_source_ends(tokenizer):
    lines = ["", " = Title = \n", "", " Once upon a time\n", " there was.\n"]
    placed = [(RowPlace(name, i), {"text": t}) for name in "ab" for i, t in enumerate(lines, 1)]
    formatter = row_formats.choose(None, tokenizer.chat())
    part = TokenDataset(tokens.tokenize(StoreBuilder(None), placed, formatter, tokenizer, 512))
    text = "".join(lines) + END
    assert learned(part, tokenizer) == [("", text * 2)]
    assert part.store.facts["kinds"] == {"blocks": 10}


def test_rows_of_text_may_be_kept_apart(tokenizer):
    part = fill([{"text": "a b"}, {"text": "c\n"}], tokenizer, template="text")
    assert learned(part, tokenizer) == [("", "a b" + END), ("", "c\n" + END)]


def test_rows_of_ids_keep_their_labels_and_lose_their_padding(tokenizer):
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, -100]}
    row["attention_mask"] = [0, 1, 1, 1, 0]
    (sample,) = fill([row], tokenizer)
    assert sample.input_ids.tolist() == [6, 7, 8]
    assert sample.is_trained.tolist() == [False, True, True]
    (sample,) = fill([{"input_ids": [5, 6], "labels": None}], tokenizer)
    assert sample.is_trained.all()
    assert fill([row], tokenizer, train_on="all")[0].is_trained.all()


def test_many_rows_keep_their_order_and_places(tokenizer):
    rows = [{"prompt": "a", "completion": str(number)} for number in range(2000)]
    part = fill(rows, tokenizer)
    assert [text for _, text in learned(part, tokenizer)] == [f"{n}{END}" for n in range(2000)]
    assert [part.place(i).number for i in range(2000)] == list(range(1, 2001))


def test_dummy_rows_are_full_trained_within_the_vocabulary_and_set_by_the_seed():
    rows = tokens.dummy_samples(5, 24, 100, seed=1)
    ids = np.stack([row.input_ids for row in rows])
    assert ids.shape == (5, 24) and ids.min() >= 0 and ids.max() < 100
    assert rows.num_trained.tolist() == [row.num_trained_tokens for row in rows] == [23] * 5
    again = np.stack([row.input_ids for row in tokens.dummy_samples(5, 24, 100, seed=1)])
    other = np.stack([row.input_ids for row in tokens.dummy_samples(5, 24, 100, seed=2)])
    assert (ids == again).all() and (ids != other).any()
