"""What a row holds and its rendering does not: refused, or counted and named; nothing is silent."""

import dataclasses
import datetime
import importlib.util
import json
import re
import types
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fsdp_qlora import config
from fsdp_qlora.data import prepare, tokenizer
from fsdp_qlora.errors import UserError
from tests import small_tokenizers

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
OF_IMAGES = ("idefics3", "llava_next", "smolvlm")  # a text content is nothing to these
STRICT = ("cohere", "cohere2", "gemma", "gemma3")  # they refuse two answers in a row
AWKWARD = (
    *(
        "  Là-bas 😀😀\n",
        "C:\\new\\table \\nabla \\u0007 \"q\" 'x'",
        "a\u3000b\u00a0c\u200bd\te\r\nf",
    ),
    *('{"a": [1, 2.50, null], "b": "c\\"d"}', "<|im_end|> <b>x</b> {{ y }} {% z %}", "1", "0"),
)
ROLES = (
    "{% if messages[0].role == 'system' %}{{ 'S:' + messages[0].content + '|' }}{% endif %}"
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "{{ m.role + ':' + m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
CUTTING = ROLES.replace("m.content +", "m.content.split('</think>')[-1] +")
THINKING = (  # Qwen 3 in short: what was thought stays in the last turn only
    "{% for m in messages %}{{ m.role + ':' }}{% if loop.last and m.reasoning_content %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '</s>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}"
    "{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "n": 3}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOL_ROW = {
    "messages": [
        {"role": "user", "content": "Wet?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain in Bergen"},
        {"role": "assistant", "content": "Yes."},
    ],
    "tools": [TOOL],
}
TOOL_USE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m.role + ':' "
    "+ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
    "{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def chat(*contents, first="user"):
    roles = ("user", "assistant") if first == "user" else (first, "user", "assistant")
    return [{"role": role, "content": c} for role, c in zip(roles * 9, contents, strict=False)]


@pytest.mark.parametrize("path", sorted(TRL.glob("*.jinja")), ids=lambda path: path.stem)
def test_no_template_of_trl_loses_a_row_without_extras_and_every_lost_message_is_found(path):
    source = path.read_text(encoding="utf-8")
    ours = tokenizer.Chat(source, NAMES, path.stem)
    rows = small_tokenizers.conversations()[:3]
    rows += [chat(a, b, b, a) for a, b in zip(AWKWARD, AWKWARD[1:] + AWKWARD[:1], strict=True)]
    num_read = 0
    for row in rows + [[{"role": "system", "content": "Say Zürich."}, *row] for row in rows]:
        turns = [i for i, message in enumerate(row) if message["role"] == "assistant"]
        try:
            texts = ours.render(row, turns)
        except tokenizer.Refused:
            with pytest.raises((jinja2.TemplateError, TypeError)):
                render_jinja_template([row], chat_template=source, **NAMES)
            continue
        assert ours.whole(row) == render_jinja_template([row], chat_template=source, **NAMES)[0][0]
        lost = list(tokenizer.find_lost(row, turns, texts, turns[-1], None))
        num_read += 1
        if path.stem.removesuffix("_training") in OF_IMAGES:
            assert lost[0][0] == "dropped"
            continue
        assert lost == []
        for number, message in enumerate(row):
            content = message["content"].strip()
            cut = [tokenizer.Text(text.text.replace(content, "", 1), ()) for text in texts]
            if cut[-1].text != texts[-1].text and len(content) > 8:
                found = list(tokenizer.find_lost(row, turns, cut, turns[-1], None))
                assert f"message {number + 1} (" in str(found), content
    assert num_read or path.stem.startswith("llava_next")


def audit(directory, rows, template, *flags):
    """Notes of the audit, decoded samples; UserError for bad rows."""
    place = small_tokenizers.save(directory / "m", "plain", chat_template=template)
    path = directory / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config.parse([f"--dataset={path}", "--context_length=400", *flags])
    light = tokenizer.read(place)
    ready = prepare.prepare(cfg, light, 600)
    ready.check()
    texts = [light.core.decode(s.input_ids.tolist(), False) for s in ready.train]
    notes = prepare.audit(cfg, ready, 1, 8).facts["notes"]
    return [note.replace(str(directory), "") for note in notes], texts


@pytest.mark.parametrize(
    ("row", "template", "words"),
    [
        (chat("17?", "<think>Ten, seven.</think>51"), CUTTING, "the reasoning of message 2 (assis"),
        ([*chat("17?", "51")[:1], {**chat("", "5")[1], "thinking": "So"}], ROLES, "reasoning of m"),
        ([*chat("a", "b"), {"role": "tool", "content": "b"}, *chat("c", "d")],
         ROLES, "message 3 (tool) 'b'"),
        (chat("Hi", "Ho", "Be brief.", "How?", "So")[:2] + chat("B.", "H?", "S", first="system"),
         ROLES, "message 3 (system) 'B.'"),
        (TOOL_ROW["messages"][:2], ROLES + "Oslo 3", "message 2 (assistant) 'weather'"),
        (TOOL_ROW["messages"], TOOL_USE, "tools 'weather'"),
        ([*chat("17?", "51")[:1], {**chat("", "5")[1], "thinking": "A", "reasoning_content": "B"}],
         THINKING, "the reasoning of message 2 (assistant) 'A'"),
        ([*chat("17?"), {**chat("", "5")[1], "reasoning": [{"type": "text", "text": "So"}]}],
         ROLES, "the reasoning of message 2 (assistant) 'So'"),
        ([*chat("Hi"), {**chat("", "")[1], "tool_calls": [{"name": "f", "parameters": {"": "Y"}}]}],
         ROLES + "f", "message 2 (assistant) 'Y'"),
    ],
    ids=["reasoning", "field", "tool", "late system", "call", "tools", "two", "parts", "other"],
)  # fmt: skip
def test_lost_text_is_refused_with_its_place_or_trained_with_leave(tmp_path, row, template, words):
    rows = [{"messages": row, "tools": [TOOL] if words.startswith("tools") else None}]
    template = template.replace("for t in tools or []", "for t in []")
    with pytest.raises(UserError) as error:
        audit(tmp_path, rows, template)
    assert "x.jsonl:1: cannot be written as text (the chat template leaves out" in str(error.value)
    assert words in str(error.value) and "--allow_dropped_text" in str(error.value)
    (note, *_), texts = audit(tmp_path, rows, template, "--allow_dropped_text")
    assert note.startswith("1 rows lose text that the chat template does not write: /x.jsonl:1 ")
    assert texts[-1] == tokenizer.Chat(template, NAMES, "").whole(row)
    with pytest.raises(UserError, match=r"message 2 \(tool\) 'Z'"):  # learned, and no answer
        audit(
            tmp_path,
            [{"messages": [*chat("a"), {"role": "tool", "content": "Z"}]}],
            ROLES,
            "--train_on=all",
        )


def test_reasoning_of_earlier_turns_that_is_cut_as_at_inference_is_counted_and_trained(tmp_path):
    """In one text it is lost and named; where each answer stands alone nothing is lost."""
    thought = [
        {**m, "reasoning_content": f"hmm {i}"} for i, m in enumerate(chat("a", "b", "c", "d"))
    ]
    row = {"messages": [m if m["role"] == "assistant" else chat("q")[0] for m in thought]}
    notes, texts = audit(tmp_path, [row], THINKING, "--train_on=last")
    assert notes == [
        "1 rows lose the reasoning of earlier turns, which the chat template leaves out as when "
        "the model is used: /x.jsonl:1 the reasoning of message 2 (assistant) 'hmm 1'"
    ]
    assert texts == ["user:q</s>assistant:b</s>user:q</s>assistant:<think>hmm 3</think>d</s>"]
    (note,), texts = audit(tmp_path, [row], THINKING)
    assert note.startswith("1 rows give 2 samples") and "hmm 1" in texts[0] and "hmm 3" in texts[1]


def test_developer_is_system_where_the_template_knows_none(tmp_path):
    rows = [{"messages": chat("In French.", "Hi", "Salut", first="developer")}]
    notes, texts = audit(tmp_path, rows, ROLES)
    assert texts == ["S:In French.|user:Hi</s>assistant:Salut</s>"]
    assert notes == [
        "1 rows have the role developer, which the chat template does not know: it is system: "
        "/x.jsonl:1"
    ]
    knows = ROLES.replace("('user',", "('developer', 'user',")
    assert audit(tmp_path, rows, knows) == (
        [], ["developer:In French.</s>user:Hi</s>assistant:Salut</s>"]
    )  # fmt: skip


def test_values_for_the_template_come_from_the_option_and_the_row(tmp_path):
    template = "{{ 'T' if enable_thinking else 'F' }}{{ style }}" + ROLES
    row = {"messages": chat("a", "b")}
    rows = [row, row | {"chat_template_kwargs": {"enable_thinking": True, "style": None}}]
    rows += [row | {"chat_template_kwargs": '{"enable_thinking": true, "tyle": "x"}'}]
    option = '--chat_template_kwargs={"enable_thinking": false, "style": "!"}'
    notes, texts = audit(tmp_path, rows, template, option)
    said = "user:a</s>assistant:b</s>"
    assert texts == [f"F!{said}", f"T!{said}", f"T!{said}"]
    (note,) = (note for note in notes if "kwargs" in note)
    assert note.endswith("that the chat template does not read: /x.jsonl:3 tyle")
    for values, words in (
        ('{"enable_thinkin": 1}', "with enable_thinkin: the chat template reads no such name"),
        ('{"messages": []}', "with messages: the chat template reads no such name"),
        ("[1]", "must be a JSON object"),
        ("{oops", "must be a JSON object"),
    ):
        with pytest.raises(UserError, match=words):
            audit(tmp_path, rows, template, f"--chat_template_kwargs={values}")
    notes, _ = audit(tmp_path, [{"text": "x " * 9}], template, option)
    assert "--chat_template_kwargs has no effect: no row goes through a chat template" in notes


@pytest.mark.parametrize("layout", ["list", "files"])
def test_rows_with_tools_use_the_template_for_them_as_transformers_does(tmp_path, layout):
    several = [{"name": "default", "template": ROLES}, {"name": "tool_use", "template": TOOL_USE}]
    place = small_tokenizers.save(
        tmp_path / "m", chat_template=several if layout == "list" else None
    )
    if layout == "files":
        (place / "chat_template.jinja").write_text(ROLES)
        (place / "additional_chat_templates").mkdir()
        (place / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE)
    full, light = AutoTokenizer.from_pretrained(place), tokenizer.read(place)
    path = tmp_path / "x.jsonl"
    rows = [TOOL_ROW, {"messages": chat("Hi", "Ho")}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ready = prepare.prepare(config.parse([f"--dataset={path}"]), light, 600)
    ready.check()
    for row, sample in zip(rows, ready.train, strict=True):
        theirs = full.apply_chat_template(row["messages"], tools=row.get("tools"))
        assert sample.input_ids.tolist() == theirs["input_ids"]
    assert light.fingerprint() == tokenizer.wrap(full, "x").fingerprint()


def test_a_list_without_a_default_is_refused_by_name_for_rows_that_need_one(tmp_path):
    named = [{"name": name, "template": TOOL_USE} for name in ("tool_use", "rag")]
    notes, texts = audit(tmp_path, [TOOL_ROW], named)
    assert notes == [] and '"city": "Oslo"' in texts[0]
    with pytest.raises(UserError, match=r"--template FILE\.jinja.* of tool_use, rag"):
        audit(tmp_path, [{"messages": chat("Hi", "Ho")}], named)


def test_a_prompt_whose_end_no_row_holds_is_named_with_the_count(tmp_path):
    """DeepSeek R1: the model is asked with an opening think tag that it never saw."""
    template = ROLES.replace("{{ 'assistant:' }}", "{{ 'assistant:<think>\n' }}")
    rows = [{"messages": chat("a", "b")}] * 2 + [{"messages": chat("a", "<think>\nc</think>b")}]
    for source in (template, template.replace(" + m.content", " }}{% generation %}{{ m.content")
                   .replace("'</s>' }}", "'</s>' }}{% endgeneration %}")):  # fmt: skip
        (note, *_), _ = audit(tmp_path, rows, source)
        assert note.startswith(
            "2 rows do not hold the prompt that the template asks with, which ends so: "
        )
        assert note.endswith(r"/x.jsonl:2 'user:a</s>assistant:<think>\n'")


def days(number):
    """Stands for the module datetime on a day of January 2026."""
    day = datetime.date(2026, 1, number)
    return types.SimpleNamespace(date=types.SimpleNamespace(today=lambda: day))


@pytest.mark.parametrize(("kind", "form"), [("llama3_2", "%d %b %Y"), ("gptoss", "%Y-%m-%d")])
def test_the_day_that_a_template_writes_is_kept_with_the_run(tmp_path, monkeypatch, kind, form):
    """Another day would be other tokens, other held-out rows, and a resume that is refused."""
    source, row = (TRL / f"{kind}.jinja").read_text(encoding="utf-8"), chat("Hi", "Ho")
    place = small_tokenizers.save(tmp_path / "m", "plain", chat_template=source)
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": row}) + "\n")
    light, day = tokenizer.read(place), datetime.datetime(2026, 1, 30)

    def tokens_of(kwargs):
        cfg = config.parse([f"--dataset={tmp_path / 'x.jsonl'}", "--context_length=2000"])
        cfg = dataclasses.replace(cfg, chat_template_kwargs=kwargs)
        ready = prepare.prepare(cfg, light, 600)
        ready.check()
        notes = prepare.audit(cfg, ready, 1, 8).facts["notes"]
        return ready.train[0].input_ids.tolist(), [note for note in notes if "date" in note]

    monkeypatch.setattr(prepare, "datetime", days(30))
    kept = prepare.dated(config.parse([]), place)
    on_first, (note,) = tokens_of(None)
    assert "it is 2026-01-30" in note
    full = AutoTokenizer.from_pretrained(place)
    fixed = source.replace(f'strftime_now("{form}")', repr(day.strftime(form)))
    assert fixed != source and "strftime_now(" not in fixed
    expected = full.apply_chat_template(row, chat_template=fixed)["input_ids"]
    assert on_first == [*expected, full.eos_token_id]  # which these templates write in other words
    monkeypatch.setattr(prepare, "datetime", days(31))
    assert tokens_of(None)[0] != on_first == tokens_of(kept)[0]
    more = config.parse(['--chat_template_kwargs={"date_string": "May 1"}'])
    assert json.loads(prepare.dated(more, place, kept)) == {
        "strftime_now": "2026-01-30",
        "date_string": "May 1",
    }
    if kind == "llama3_2":
        assert "May 1" in full.decode(tokens_of(prepare.dated(more, place, kept))[0])
    with pytest.raises(UserError, match=r"cannot be written as text.*'31st'"):
        tokens_of('{"strftime_now": "31st"}')
    plain = small_tokenizers.save(tmp_path / "p", "plain", chat_template=ROLES)
    assert prepare.dated(config.parse([]), plain) is None


@pytest.mark.parametrize("path", sorted(TRL.glob("*.jinja")), ids=lambda path: path.stem)
def test_each_of_two_answers_in_a_row_is_learned_once(path):
    """As the marks of TRL's training templates have it; what stands between them is given."""
    ours = tokenizer.Chat(path.read_text(encoding="utf-8"), NAMES, path.stem)
    names, num_read = {"u": "user", "a": "assistant", "s": "system"}, 0
    for roles in ("uaa", "uaaua", "uauaa", "suaa", "uaaa", "auaa"):
        row = [{"role": names[r], "content": f"word{i}"} for i, r in enumerate(roles)]
        turns = [i for i, role in enumerate(roles) if role == "a"]
        try:
            texts = ours.render(row, turns)
        except tokenizer.Refused:
            continue
        if any(kind == "dropped" for kind, _ in tokenizer.find_lost(row, turns, texts, 9, None)):
            continue
        learned = "|".join(text.text[a:b] for text in texts for a, b in text.spans)
        assert re.findall(r"word\d", learned) == [f"word{i}" for i in turns], learned
        own = len(texts) == len(turns) > 1  # each text ends with its own answer
        assert not own or [len(text.spans) for text in texts] == [1] * len(turns)
        markers = [mark for mark in ("<|im_start|>", "<|start|>", "[INST]") if mark in learned]
        assert not markers or path.stem.endswith("_training")
        num_read += 1
    assert num_read or path.stem.removesuffix("_training") in (*OF_IMAGES, *STRICT)
