"""What the assistant says: found in every template, token by token as transformers marks it."""

import json
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto

from fsdp_qlora.data import row_formats, tokenizer, tokens
from fsdp_qlora.data.sources import RowPlace
from fsdp_qlora.data.tokenizer import Chat, Refused, Template, Text
from fsdp_qlora.errors import UserError
from tests import small_tokenizers
from tests.data import trl_masks
from tests.small_tokenizers import MARKED, conversations

KINDS = sorted(MARKED)
STORED = json.loads(trl_masks.FILE.read_text(encoding="utf-8"))
# Special and added tokens, what classes of tokenizers split in other ways, decomposed letters.
PIECES = ["<|user|>", "<new>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "</s>", "<s>"]
PIECES += [
    " ",
    "  ",
    "\n",
    "\t",
    "Hi",
    " the",
    "ing",
    "UP",
    "'s",
    "e\u0301",
    "漢字",
    "2026",
    "1",
    ".",
]
CAFE = [
    {"role": "user", "content": "Où est le café 😀😀?"},
    {"role": "assistant", "content": "  Là-bas 😀😀\n"},
    {"role": "user", "content": "<|im_end|> thanks 漢字"},
    {"role": "assistant", "content": "漢字 é"},
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Directories with a tokenizer of each kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: small_tokenizers.save(root / kind, kind) for kind in [*KINDS, "plain"]}


def samples(text_tokenizer, chats, template=None, **how):
    """Samples of conversations, as (ids, learned)."""
    chat = text_tokenizer.chat()
    formatter = row_formats.choose(template, chat, **how)
    rows = ((RowPlace("x", n), {"messages": chat}) for n, chat in enumerate(chats, 1))
    store = tokens.tokenize(tokens.StoreBuilder(None), rows, formatter, text_tokenizer, 4096)
    assert store.facts["bad"] == []
    return [(s.input_ids.tolist(), s.is_trained.tolist()) for s in tokens.TokenDataset(store)]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_equal_those_of_transformers_token_by_token(places, kind):
    """The reference has the template marked by hand; ours sees the plain one."""
    full = AutoTokenizer.from_pretrained(places[kind])
    chats = [*conversations(), CAFE]
    ours = samples(tokenizer.read(places[kind]), chats)
    assert len(ours) == len(chats) > 6
    for chat, (ids, is_learned) in zip(chats, ours, strict=True):
        reference = full.apply_chat_template(
            chat, chat_template=MARKED[kind], return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids == reference["input_ids"] == list(full.apply_chat_template(chat).input_ids)
        assert is_learned == [bool(flag) for flag in reference["assistant_masks"]]
        assert 0 < sum(is_learned) < len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_marked_template_is_believed(places, kind):
    text_tokenizer = tokenizer.read(places[kind])
    path = places[kind] / "marked.jinja"
    path.write_text(MARKED[kind])
    chats = conversations()
    assert samples(text_tokenizer, chats, str(path)) == samples(text_tokenizer, chats)


@pytest.mark.parametrize("kind", [*KINDS, "plain"])
def test_the_light_tokenizer_gives_the_ids_of_transformers(places, kind):
    check_light_tokenizer(places[kind])


def check_light_tokenizer(place):
    full = AutoTokenizer.from_pretrained(place)
    light, wrapped = tokenizer.read(place), tokenizer.wrap(full, "x")
    texts = [text for chat in [*conversations(), CAFE] for text in (m["content"] for m in chat)]
    chance = random.Random(0)
    texts += ["".join(chance.choices(PIECES, k=chance.randint(1, 12))) for _ in range(100)]
    expected = full(texts)["input_ids"]
    for ours in (light, wrapped):
        assert [encoding.ids for encoding in ours.encode(texts, True)] == expected
        adds_bos = full("").input_ids[:1] == [full.bos_token_id]
        assert (ours.eos_id, ours.adds_bos) == (full.eos_token_id, adds_bos)
        assert (ours.names, ours.chat_template) == (wrapped.names, full.chat_template)
    assert light.fingerprint() == wrapped.fingerprint()


@pytest.mark.parametrize(
    "config",
    [
        {"add_bos_token": True},
        {"add_eos_token": True, "add_bos_token": True},
        {"add_bos_token": False},
        {"unk_token": "<unknown>", "extra_special_tokens": {}},
    ],
)
def test_the_light_tokenizer_heeds_its_configuration(tmp_path, config):
    for kind in ("plain", "llama3"):
        check_light_tokenizer(small_tokenizers.save(tmp_path / kind, kind, **config))


UNKNOWN = {"unk_token": "<|endoftext|>"}  # Gemma's class wants one that is there
OWN = [("gemma3_text", "GemmaTokenizerFast"), ("cohere2", "CohereTokenizer")]
OWN += [("qwen3_moe", "Qwen2TokenizerFast"), ("qwen3_5", "Qwen3_5Tokenizer")]


def added(number, text, is_special):
    others = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {str(number): {"content": text, "special": is_special, **others}}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": added(600, "<|user|>", True) | added(601, "<new>", False)}, {}),
        ({}, {"added_tokens.json": {"<|user|>": 600, "<new>": 601}}),
        ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<|user|>"]}}),
        ({"extra_special_tokens": ["<|user|>"]}, {}),
        ({"extra_special_tokens": {"user_token": "<|user|>"}}, {}),
        ({"split_special_tokens": True}, {}),
        ({"split_special_tokens": True, "added_tokens_decoder": added(600, "<new>", False)}, {}),
        ({"tokenizer_class": "Qwen2Tokenizer"}, {"config.json": {"model_type": "qwen3"}}),
        ({}, {"config.json": {"model_type": "qwen2"}}),
        ({"tokenizer_class": "CohereTokenizer"}, {}),
        *((UNKNOWN | {"tokenizer_class": n}, {"config.json": {"model_type": t}}) for t, n in OWN),
        ({"tokenizer_class": "GPTNeoXTokenizerFast"}, {"config.json": {"model_type": "gpt_neox"}}),
        ({"tokenizer_class": "LlamaTokenizer"}, {"config.json": {"model_type": "llama"}}),
        ({"tokenizer_class": None}, {"config.json": {"model_type": "gpt2"}}),
    ],
)
def test_every_layout_of_files_gives_the_ids_of_transformers(tmp_path, config, files):
    place = small_tokenizers.save(tmp_path, "chatml", **config)
    for name, value in files.items():
        (place / name).write_text(json.dumps(value))
    check_light_tokenizer(place)
    usual = tokenizer.read(small_tokenizers.save(tmp_path / "usual", "chatml")).fingerprint()
    is_usual = config.get("tokenizer_class") == "LlamaTokenizer"  # its file is believed
    assert (usual == tokenizer.read(place).fingerprint()) == is_usual


def test_own_classes_are_those_of_transformers_and_need_no_torch(tmp_path):
    """Where the files name them."""
    places = [small_tokenizers.save(tmp_path / t, tokenizer_class=name) for t, name in OWN]
    for (model_type, _), place in zip(OWN, places, strict=True):
        (place / "config.json").write_text(json.dumps({"model_type": model_type}))
    code = "import sys; from pathlib import Path; from fsdp_qlora.data import tokenizer\n"
    code += "print(*[type(tokenizer.read(Path(p)).full).__name__ for p in sys.argv[1:]])\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print('torch' in sys.modules)", *map(str, places)],
        **{"text": True, "check": True, "stdout": subprocess.PIPE},
    )
    assert done.stdout.split() == [*(name.removesuffix("Fast") for _, name in OWN), "False"]
    for model_type, name in tokenization_auto.TOKENIZER_MAPPING_NAMES.items():
        kinds = (own for t, own in tokenizer.OWN_CLASSES.items() if re.fullmatch(t, model_type))
        assert next(kinds, name) == name, model_type


def test_types_whose_class_is_not_that_of_the_files_are_known():
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    general = {*tokenizer.GENERAL_CLASSES, "PythonBackend", "MistralCommonBackend"}
    for model_type in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        is_known = model_type.startswith(tokenizer.REBUILT_TYPES)
        assert is_known or names[model_type] in general, model_type


def test_a_template_in_a_file_of_its_own_or_among_several_is_found(tmp_path):
    check_light_tokenizer(small_tokenizers.save(tmp_path / "chatml", "chatml"))
    place = small_tokenizers.save(tmp_path / "plain")
    (place / "chat_template.jinja").write_text(small_tokenizers.LLAMA3)
    check_light_tokenizer(place)
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    place = small_tokenizers.save(tmp_path / "several", chat_template=several)
    assert tokenizer.read(place).chat_template == "d"


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (LOOP + "{{ 'aaaaaaaa' * 999 }}{% endfor %}{% endfor %}", "writes more than 67,108,864"),
        ("{{ 10**4 * 'a' * 10**9 }}", "writes more than 67,108,864"),
        ("{{ messages * 10**10 }}", "writes more than 67,108,864"),
        ("{{ 7 ** (10**11) }}", "writes more than 67,108,864"),
        (LOOP + "{% endfor %}{% endfor %}", "writes one row for more than 0.3 s"),
    ],
)
def test_a_template_may_not_take_the_host(monkeypatch, source, words):
    """The alarm that somebody else has set goes off all the same; small products are computed."""
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        monkeypatch.setattr(tokenizer, "LONGEST_RENDER_S", 0.3 if "0.3" in words else 30)
        with pytest.raises(UserError, match=f"made by hand: {words}"):
            Chat(source, {}, "made by hand").whole([{"role": "user", "content": "a"}])
        assert 0 < signal.setitimer(signal.ITIMER_REAL, 0.01)[0] <= 5
        time.sleep(0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    small = Template("{{ '-' * 3 }}{{ 2 ** 10 }}{{ [1] * 2 }}", {}, "x")
    assert heard == [1] and small.fill()[0] == "---1024[1, 1]"


@pytest.mark.parametrize("kind", KINDS)
def test_last_is_the_last_answer_and_all_is_everything(places, kind):
    text_tokenizer = tokenizer.read(places[kind])
    chat = conversations()[0]
    (ids, answers), (_, last), (_, every) = (
        samples(text_tokenizer, [chat], train_on=how)[0] for how in ("assistant", "last", "all")
    )
    assert all(every) and len(every) == len(ids)
    edges = np.nonzero(np.diff(answers))[0]
    assert len(edges) >= 3
    assert last == [flag and i > edges[-1 if answers[-1] else -2] for i, flag in enumerate(answers)]
    assert samples(text_tokenizer, [chat], train_on="completion")[0][1] == answers


def test_the_plain_template_ends_every_answer_and_starts_as_the_tokenizer_does(tmp_path, places):
    chat = [{"role": "system", "content": "S"}, *conversations()[0][:4]]
    for place, start in (
        (places["plain"], ""),
        (small_tokenizers.save(tmp_path, "plain", adds_bos=True), "<s>"),
    ):
        text_tokenizer = tokenizer.read(place)
        ((ids, is_learned),) = samples(text_tokenizer, [chat])
        text = text_tokenizer.core.decode(ids, False)
        assert text.startswith(f"{start}### System: S\n### Human: I do not")
        learned = [i for i, flag in zip(ids, is_learned, strict=True) if flag]
        said = "".join(f" {m['content']}</s>\n" for m in chat if m["role"] == "assistant")
        assert text_tokenizer.core.decode(learned, False) == said


class _Names(dict):
    """bos_token and eos_token."""


NAMES = _Names(bos_token="<s>", eos_token="</s>")
PAIR = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "<think>why</think>A"},
    {"role": "user", "content": "b?"},
    {"role": "assistant", "content": "<think>how</think>B"},
]
REWRITING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'U:' + m.content + '\n' }}"
    "{% elif loop.last %}{{ 'A:' + m.content + '</s>' }}"
    "{% else %}{{ 'A:' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
ENDING = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% else %}{{ eos_token }}{% endif %}"
)
CUE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'U:' + m.content }}"
    "{% else %}{{ 'A:' + m.content.split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:<think>' }}{% endif %}"
)


def learned(texts: list[Text]) -> list[tuple[str, list[str]]]:
    return [(text.text, [text.text[a:b] for a, b in text.spans]) for text in texts]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            REWRITING,
            [
                ("U:a?\nA:<think>why</think>A</s>", ["<think>why</think>A</s>"]),
                ("U:a?\nA:A</s>U:b?\nA:<think>how</think>B</s>", ["<think>how</think>B</s>"]),
            ],
        ),
        (
            ENDING,
            [
                (
                    "user:a?|assistant:<think>why</think>A|user:b?|"
                    "assistant:<think>how</think>B|</s>",
                    ["<think>why</think>A|", "<think>how</think>B|</s>"],
                )
            ],
        ),
        (CUE, [("U:a?A:A</s>U:b?A:B</s>", ["A</s>", "B</s>"])]),
    ],
    ids=["earlier turns are written in another way", "the end stands once", "a cue is left out"],
)
def test_an_answer_is_learned_in_the_text_that_the_model_will_see(source, expected):
    chat = Chat(source, NAMES, "t")
    assert learned(chat.render(PAIR, [1, 3])) == expected


def test_a_conversation_may_begin_with_the_assistant():
    chat = Chat("{{ messages[0].role[:0] }}" + ENDING, NAMES, "t")
    messages = [{"role": "assistant", "content": "Hello."}, *PAIR[:2]]
    ((_, spans),) = learned(chat.render(messages, [0, 2]))
    assert spans == ["Hello.|", "<think>why</think>A|</s>"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for m in messages %}", "t:1: is not a Jinja template"),
        ("a\n{{ b", "t:2: is not a Jinja template"),
    ],
)
def test_a_broken_template_is_named_with_its_line(source, words):
    with pytest.raises(UserError, match=words):
        Template(source, NAMES, "t")


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_what_a_template_raises_or_may_not_do_is_a_refusal(source):
    with pytest.raises(Refused):
        Chat(source, NAMES, "t").render(PAIR, [1])


def test_a_template_sees_what_transformers_gives_it():
    """Filters, tests and functions that real templates use."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {{ m | tojson }}{{ {'a': ['<é>']} | tojson(indent=1) }}\n{% endfor %}"
        "{{ strftime_now('%Y') }}{{ bos_token }}{% if tools is none %}none{% endif %}"
        "{{ 'x' if documents is none }}{{ namespace(a=1).a }}{{ undefined_name }}"
    )
    ours = Chat(source, NAMES, "t").whole(PAIR)
    theirs, _ = render_jinja_template([PAIR], chat_template=source, **NAMES)
    assert ours == theirs[0]
    source = (
        "{% for m in messages %}U{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    texts, spans = render_jinja_template(
        [PAIR], chat_template=source, return_assistant_tokens_mask=True, **NAMES
    )
    ours = Template(source, NAMES, "t").fill(messages=PAIR)
    assert ours == (texts[0], tuple(spans[0])) and len(spans[0]) == len(PAIR)


@pytest.mark.parametrize("kind", trl_masks.KINDS)
def test_masks_equal_those_of_trl_token_by_token(tmp_path, kind):
    """TRL knows each template by heart and marks it; ours finds the answers in the plain one.

    For Qwen 2.5 TRL learns the line break behind "<|im_start|>assistant" too, which whoever asks
    the model writes: that one token of each answer is the only difference.
    """
    stored = STORED[kind]
    light = tokenizer.read(trl_masks.save(tmp_path / kind, kind, stored["template"]))
    ours = samples(light, conversations())
    assert len(ours) == len(stored["ids"]) > 3
    for chat, ids, mask, (our_ids, is_learned) in zip(
        conversations(), stored["ids"], stored["masks"], ours, strict=True
    ):
        assert our_ids == ids
        differ = np.nonzero(np.array(is_learned) != np.array([flag == "1" for flag in mask]))[0]
        num_answers = sum(message["role"] == "assistant" for message in chat)
        assert len(differ) == (num_answers if kind == "qwen2_5" else 0)
        assert {light.core.decode([ids[i]], False) for i in differ} <= {"\n"}
        assert not any(is_learned[i] for i in differ)
        assert 0 < sum(is_learned) < len(ids)
