"""The prompts of a run: the user's own, from a file, or three held-out ones."""

import json

import pytest
from transformers import AutoTokenizer

from fsdp_qlora import config
from fsdp_qlora.data import prepare, prompts, tokenizer
from fsdp_qlora.errors import UserError
from tests import small_tokenizers


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {k: small_tokenizers.save(root / k, k) for k in ("plain", "chatml", "llama3")}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": f" It is {i * i}."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choose(place, dataset, *flags):
    """The prompts, and their texts as the model sees them."""
    cfg = config.parse(["--dataset", str(dataset), "--token_cache=off", *map(str, flags)])
    light = tokenizer.read(place)
    found = prompts.choose_prompts(cfg, prepare.prepare(cfg, light, 700), light)
    return found, [light.core.decode(prompt.ids, False) for prompt in found]


def test_three_held_out_rows_are_asked_up_to_their_answer(places, pairs):
    """Another seed asks others; the answer of the data is kept beside."""
    found, texts = choose(places["plain"], pairs, "--eval_samples=9")
    assert len(found) == 3
    for prompt, text in zip(found, texts, strict=True):
        number = int(prompt.shown.removeprefix("What is ").removesuffix("?"))
        assert text == prompt.shown and prompt.expected == f"It is {number * number}."
    assert choose(places["plain"], pairs, "--eval_samples=9")[0] == found
    assert choose(places["plain"], pairs, "--eval_samples=9", "--seed=3")[0] != found
    assert len(choose(places["plain"], pairs, "--eval_samples=2")[0]) == 2
    assert choose(places["plain"], pairs)[0] == ()
    assert choose(places["plain"], pairs, "--eval_samples=9", "--sample_prompts=off")[0] == ()


def test_a_held_out_chat_is_asked_up_to_the_assistants_first_turn(places):
    rows = small_tokenizers.ROWS / "chitchat.jsonl"
    found, texts = choose(places["chatml"], rows, "--eval_samples=3", "--context_length=2048")
    chats = [json.loads(line)["messages"] for line in rows.read_text().splitlines()]
    firsts = {next(m["content"] for m in c if m["role"] == "assistant").strip() for c in chats}
    assert len(found) == 3 and {prompt.expected for prompt in found} <= firsts
    assert all(text.endswith("<|im_start|>assistant\n") for text in texts)
    asked = set()  # by the user, as they wrote it: no system prompt, no word of the template
    for chat in chats:
        first = next(i for i, message in enumerate(chat) if message["role"] == "assistant")
        asked.add(chat[first - 1]["content"].strip())
    assert {prompt.shown for prompt in found} <= asked


def test_what_is_shown_of_a_held_out_row_is_its_question_and_keeps_its_lines(places, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": f"Add {i}:\n- a\n- b", "input": "1 2" * (i % 2), "output": str(i)}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, texts = choose(places["plain"], path, "--eval_samples=9", "--template=alpaca")
    assert all("### Response:" in text for text in texts)
    for prompt in found:
        head, _, given = prompt.shown.partition("\n\n### Input:\n")
        row = rows[int(prompt.expected)]
        assert (head, given) == (row["instruction"], row["input"])


def test_running_text_is_continued_from_its_first_tokens(places, tmp_path):
    (tmp_path / "x.txt").write_text("The whale is a mammal, and no fish. " * 400)
    flags = ("--eval_split=0.2", "--context_length=128", "--sample_tokens=8")
    found, _ = choose(places["plain"], tmp_path / "x.txt", *flags)
    assert {len(prompt.ids) for prompt in found} == {32}
    assert all(0 < len(prompt.expected) < 80 for prompt in found)


def test_a_file_of_prompts_is_asked_in_the_shape_of_the_rows(places, tmp_path):
    """Lines of text, or JSON: text, {"prompt"}, {"messages"}; with --sample_prompt first."""
    (tmp_path / "x.txt").write_text("How?\n\nWhy <b>?\n")
    rows = small_tokenizers.ROWS / "chitchat.jsonl"
    flags = ("--eval_samples=3", "--sample_prompt=Who?", f"--sample_prompts={tmp_path / 'x.txt'}")
    found, texts = choose(places["llama3"], rows, *flags)
    assert [prompt.shown for prompt in found] == ["Who?", "How?", "Why <b>?"]
    for prompt, text in zip(found, texts, strict=True):
        assert text.startswith("<|begin_of_text|><|start_header_id|>user")
        assert prompt.shown in text and text.count("<|begin_of_text|>") == 1
        assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    values = ["How?", {"prompt": "Why <b>?"}, {"messages": chat}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    found, more = choose(places["llama3"], rows, f"--sample_prompts={tmp_path / 'x.jsonl'}")
    assert more[:2] == texts[1:] and "Be brief." in more[2] and found[2].shown == "Where?"
    template = tmp_path / "t.jinja"
    template.write_text("{{ style }}{{ tools }}" + small_tokenizers.LLAMA3)
    own = [{"style": "!!"}, '{"style": "??"}']
    values = [{**row, "chat_template_kwargs": o} for row, o in zip(values[1:], own, strict=True)]
    values[0]["tools"] = [{"name": "find"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(v) + "\n" for v in ["How?", *values]))
    flags = (f"--sample_prompts={tmp_path / 'x.jsonl'}", f"--template={template}")
    _, more = choose(places["llama3"], rows, *flags, '--chat_template_kwargs={"style": "::"}')
    starts = [text.partition("<|begin")[0] for text in more]
    assert starts == ["::None", "!![{'name': 'find'}]", "??None"]


def test_a_chat_is_asked_with_the_ids_that_transformers_makes(tmp_path):
    """The tokenizer puts <|endoftext|> before plain texts, the template before none."""
    place = small_tokenizers.save(tmp_path / "m", "chatml", adds_bos=True)
    rows = small_tokenizers.ROWS / "chitchat.jsonl"
    (prompt,), _ = choose(place, rows, "--eval_samples=3", "--sample_prompt=Who?")
    theirs = AutoTokenizer.from_pretrained(place).apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True
    )
    assert list(prompt.ids) == theirs["input_ids"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.txt", "", "is empty"),
        ("x.jsonl", '"a"\n{"question": 1}\n', r"x\.jsonl:2: is no prompt in JSON"),
        ("x.jsonl", "[1]\n", r"x\.jsonl:1: is no prompt in JSON"),
        ("x.jsonl", "How?\n", r"x\.jsonl:1: is no prompt in JSON"),
    ],
)
def test_a_file_that_holds_no_prompts_is_named_with_its_line(places, pairs, name, content, words):
    (pairs.parent / name).write_text(content)
    with pytest.raises(UserError, match=words):
        choose(places["plain"], pairs, f"--sample_prompts={pairs.parent / name}")


def test_losses_between_need_held_out_rows(places, pairs):
    with pytest.raises(UserError, match="--eval_every epoch: no rows are held out"):
        choose(places["plain"], pairs, "--eval_every=epoch")
    with pytest.raises(UserError, match="must be epoch or >= 1"):
        config.parse(["--eval_every=0"])
