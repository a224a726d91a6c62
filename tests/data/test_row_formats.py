"""What a row's columns make of it, and what --template makes of it instead."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fsdp_qlora import fetch
from fsdp_qlora.data import row_formats
from fsdp_qlora.data.row_formats import LABEL_PROMPT
from fsdp_qlora.data.sources import TextPiece
from fsdp_qlora.data.tokenizer import Refused
from fsdp_qlora.errors import UserError
from tests import small_tokenizers

ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Oh."}]}
SHAREGPT = {
    "system": "S",
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Oh."},
        {"from": "observation", "value": "42"},
        {"from": "function_call", "value": "f()"},
    ],
}


def turn(role, content, **others):
    return {"role": role, "content": content, **others}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizers.make(tmp_path_factory.mktemp("tokenizer"), "chatml")


@pytest.fixture
def choose(tokenizer):
    """--template, --train_on and --system_prompt to a formatter."""

    def choose(template=None, **how):
        return row_formats.choose(template, tokenizer.chat(), **how)

    return choose


def written(formatter, row):
    """(text, learned parts) of a row of one text."""
    assert formatter.problem(row) is None
    (text,) = formatter.render(row)
    return text.text, [text.text[a:b] for a, b in text.spans]


def test_rows_of_two_parts_become_prompt_and_completion():
    prompt, completion = small_tokenizers.pair(ALPACA)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n" in prompt
    assert completion == "2"
    for nothing in ("", None):
        prompt, _ = small_tokenizers.pair(ALPACA | {"input": nothing})
        assert "Input" not in prompt and "paired with" not in prompt
    row = {"question": "Who?", "answer": "Ada"}
    assert small_tokenizers.pair(row) == ("###Question:\nWho?\n###Answer:\n", "Ada")
    prompt, _ = small_tokenizers.pair(row | {"context": "a table"})
    assert prompt == "###Context:\na table\n###Question:\nWho?\n###Answer:\n"
    assert small_tokenizers.pair({"prompt": "a ", "completion": " b"}) == ("a ", " b")


def test_a_guanaco_dialogue_is_learned_from_the_first_answer_on(choose):
    row = {"text": "### Human: Hi.### Assistant: Hello.### Human: Bye.### Assistant: Bye."}
    assert written(choose(), row)[1] == [" Hello.### Human: Bye.### Assistant: Bye."]
    assert choose().name(row) == "text" and choose().name({"text": "Once upon"}) == "blocks"


def test_real_rows_of_every_kind_are_learned_where_they_answer(choose):
    """Docstrings of the standard library as each shape; chats of students."""
    docs = {name: text for name, text in fetch.builtin_docs() if len(text) > 40}
    assert len(docs) > 150
    formatter = choose()
    for name, text in docs.items():
        question = f"What does {name} do?"
        label = {"name": {name: [[0, len(name)]]}}
        shown = json.dumps(label)
        for row, answer in (
            ({"instruction": question, "input": "", "output": text}, text),
            ({"question": question, "context": name, "answer": text}, text),
            ({"prompt": question, "completion": " " + text}, " " + text),
            ({"text": text, "label": label}, shown + "<|im_end|>\n"),
            ({"text": text, "label": shown}, shown + "<|im_end|>\n"),
        ):
            whole, learned = written(formatter, row)
            assert learned == [answer] and whole.endswith(answer) and len(whole) > len(answer)
    for messages in small_tokenizers.conversations():
        said = [f"{m['content']}<|im_end|>\n" for m in messages if m["role"] == "assistant"]
        assert written(formatter, {"messages": messages})[1] == said


def test_labels_are_asked_for_with_a_system_prompt(choose):
    row = {"text": "Ada wrote.", "label": {"name": {"Ada": [[0, 2]], "é": []}}}
    text, learned = written(choose(), row)
    assert text.startswith(f"<|im_start|>system\n{LABEL_PROMPT}<|im_end|>\n<|im_start|>user")
    assert learned == ['{"name": {"Ada": [[0, 2]], "é": []}}<|im_end|>\n']
    text, _ = written(choose(system="Find names."), row)
    assert text.startswith("<|im_start|>system\nFind names.<|im_end|>\n")


def test_sharegpt_rows_become_messages(choose):
    assert [m["role"] for m in row_formats.chats.conversation(SHAREGPT)] == [
        *("system", "user", "assistant", "tool", "function_call")
    ]
    text, learned = written(choose(), SHAREGPT)
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>")
    assert learned == ["Oh.<|im_end|>\n", "f()<|im_end|>\n"]
    parts = [{"type": "text", "text": "H"}, {"type": "text", "value": "i", "image": None}]
    row = {"conversations": [{"role": "user", "content": parts}, CHAT["messages"][1]]}
    assert written(choose(), row) == written(choose(), CHAT)


@pytest.mark.parametrize(
    ("row", "question"),
    [
        (ALPACA, "Add.\n\n1 + 1"),
        ({"question": "Who?", "answer": "2", "context": "a table"}, "a table\n\nWho?"),
        ({"prompt": "Say", "completion": "2"}, "Say"),
        (CHAT, "Hi"),
    ],
)
def test_any_question_and_answer_goes_through_the_chat_template_if_asked(choose, row, question):
    text, (learned,) = written(choose("chat"), row)
    assert text == (
        f"<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        f"<|im_start|>assistant\n{learned}"
    )
    assert learned in ("2<|im_end|>\n", "Oh.<|im_end|>\n")
    formatter = choose("chat")
    assert formatter.name(row) in ("chat", f"{row_formats.match(row).name} as chat")
    assert formatter.ask("Hi", row) == formatter.chat.prompt([{"role": "user", "content": "Hi"}])


def test_a_format_string_learns_its_last_column(choose):
    row = {"Description": "Cough", "Patient": "I cough.", "Doctor": "Rest.", "age": 7}
    form = "Description: {Description}\\nPatient ({age}): {Patient} Doctor: {Doctor}!"
    formatter = choose(form)
    text, learned = written(formatter, row)
    assert text == "Description: Cough\nPatient (7): I cough. Doctor: Rest.!"
    assert learned == ["Rest.!"]
    assert written(choose(form, train_on="all"), row)[1] == [text]
    assert "(want Description+age+Patient+Doctor)" in formatter.problem(
        {"Description": "a", "age": 1}
    )
    assert 'field "age" is null' in formatter.problem(row | {"age": None})
    assert "is a list" in formatter.problem([])


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("{a", "expected '}'"),
        ("{}", "want the name of a column"),
        ("{a!r}", "want the name of a column"),
        ("{a[0]}", "want the name of a column"),
        ("{{a}}", "names no {column}"),
        ("alpacca", "is no template"),
        ("absent.jinja", "No such file"),
    ],
)
def test_a_template_that_is_none_is_refused(choose, form, words):
    with pytest.raises(UserError, match=words):
        choose(form)


def test_a_jinja_file_over_columns_learns_what_is_marked_or_all(choose, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("Q {{ q }}{% generation %} A {{ a }}{% endgeneration %}.")
    assert written(choose(str(path)), {"q": 1, "a": "x"}) == ("Q 1 A x.", [" A x"])
    assert choose(str(path)).render({"q": 1, "a": "x"})[0].has_markup is False
    path.write_text("{{ bos_token }}{{ q }}")
    (text,) = choose(str(path)).render({"q": "x"})
    assert text == ("<|endoftext|>x", ((0, 14),), True, ())
    for row in ({"p": 1}, {}):
        with pytest.raises(Refused, match="'q' is undefined"):
            choose(str(path)).render(row)
    path.write_text("{{ messages[0].content }}{% if add_generation_prompt %}A{% endif %}")
    assert choose(str(path)).format_name == "chat"
    assert choose(str(path)).ask("Hi", ALPACA) == "HiA"


def test_a_system_prompt_stands_before_every_kind(choose):
    formatter = choose(system="S")
    text, learned = written(formatter, {"prompt": "a ", "completion": "b"})
    assert (text, learned) == ("S\n\na b", ["b"])
    assert formatter.ask("a ", {"prompt": "x", "completion": "y"}) == "S\n\na "
    for row in (CHAT, SHAREGPT):
        assert written(formatter, row)[0].startswith(
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>u"
        )


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "input": "", "output": ""},
        {"question": "Q", "answer": ""},
        {"prompt": "Q", "completion": ""},
        {"text": "### Human: Q\n### Assistant: A"},
    ],
)
def test_a_question_asked_like_the_rows_gives_the_prompt_such_a_row_would_have(row, choose):
    assert choose().ask("Q", row) == small_tokenizers.pair(row)[0]


def test_a_question_asked_of_other_rows_is_itself_or_a_chat(choose):
    for row in ({"text": "anything"}, {"input_ids": [1]}, TextPiece("a", True), None):
        assert choose().ask("Once", row) == "Once"
    prompt = "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    assert choose().ask("Q", CHAT) == prompt + "<|im_start|>assistant\n"
    asked = choose().ask("Q", {"text": "a", "label": []})
    assert LABEL_PROMPT in asked and asked.endswith("Q<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "is a list (want an object with named fields)"),
        ({}, "has fields none (want input_ids | messages | instruction+output |"),
        ({"a": 1, "b\n": 2}, "has fields a, b\\n (want"),
        (ALPACA | {"input": ["x"]}, 'field "input" is a list (want text)'),
        (ALPACA | {"instruction": {"a": "b"}}, 'field "instruction" is an object (want text)'),
        ({"text": "a", "label": None}, 'field "label" is null'),
        ({"text": "a", "label": ["\ud800"]}, 'field "label" holds half a surrogate pair'),
        ({"text": 1, "label": "x"}, 'field "text" is a number'),
        ({"messages": None}, 'field "messages" is null (want a list'),
        ({"messages": [7]}, "message 1 is a number (want an object"),
        ({"messages": [{"role": [], "content": ""}]}, "message 1 has role [] (want system"),
        (
            {"messages": [{"role": "user", "content": [{"image": 1}]}]},
            "message 1 content is a list",
        ),
        ({"conversations": [{"from": "human", "value": 1}]}, "message 1 content is a number"),
        (SHAREGPT | {"system": 1}, '"system" is a number'),
        ({"messages": [{"role": "user", "content": "", "weight": 0.5}]}, "weight is 0.5 (want 0"),
        (
            {"messages": [turn("gpt", None, tool_calls="f()")]},
            '"tool_calls of message 1" is not JSON',
        ),
        (
            {"messages": [turn("gpt", None, tool_calls="[1]")]},
            "is a list (want a list of objects)",
        ),
        ({"messages": [turn("user", [{"type": "image", "text": ""}])]}, "1 content is a list"),
        (ALPACA | {"system": 7}, '"system" is a number (want text)'),
        (ALPACA | {"history": "[oops"}, 'field "history" is not JSON'),
        (ALPACA | {"history": [["a"]]}, 'field "history" is a list (want a list of [question,'),
        (ALPACA | {"history": {"a": 1}}, 'field "history" is an object (want'),
        ({"prompt": [], "completion": []}, 'field "prompt" is an empty list (want a list of'),
        ({"input_ids": [1, True]}, 'field "input_ids" is not a list of whole numbers'),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, 'field "labels" differs from "input_ids"'),
    ],
)
def test_a_bad_row_is_described_by_its_field(row, words, choose):
    assert words in choose().problem(row)


@pytest.mark.parametrize(
    ("template", "row", "words"),
    [
        ("alpaca", CHAT, "has fields messages (want instruction+output)"),
        ("text", ALPACA, "(want text)"),
        ("chat", {"text": "a"}, "is no conversation (want messages, or an answer)"),
        ("chat", {"a": 1}, "has fields a"),
        ("chat", TextPiece("a", True), "is running text"),
    ],
)
def test_a_row_of_another_kind_than_asked_for_is_refused(template, row, words, choose):
    assert words in choose(template).problem(row)


def test_tools_are_shown_to_the_template(choose, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ tools | tojson }}{{ messages[0].content }}")
    for tools in ([{"name": "f"}], '[{"name": "f"}]'):
        assert choose(str(path)).render(CHAT | {"tools": tools})[0].text == '[{"name": "f"}]Hi'
    with pytest.raises(Refused, match='"tools" is not JSON'):
        choose(str(path)).render(CHAT | {"tools": "[oops"})
    tools = [{"type": "function", "function": {"name": "f"}}]
    wanted = choose(str(path)).render(CHAT | {"tools": tools})
    others = ({"tools": [json.dumps(tools[0])]}, {"chat_template_kwargs": {"tools": tools}})
    for other in (*others, {"functions": '[{"name": "f"}]'}):
        assert choose(str(path)).render(CHAT | other) == wanted
    for wrong in ({"tools": tools[0]}, {"functions": ["f"]}, {"tools": '[{"a": 1, "a": 2}]'}):
        with pytest.raises(Refused, match=r'field "(tools|functions)" is (a|not)'):
            choose(str(path)).render(CHAT | wrong)


def test_fields_of_messages_are_used_or_named(choose, tmp_path):
    """Thoughts under another name, a second text, switches of others, tools of a message."""
    others = {"thought": "So", "value": "Oh!", "trainable": False, "tools": [{"name": "f"}]}
    row = {"messages": [turn("user", "Hi"), turn("assistant", "Oh.", **others, author=None)]}
    names = [f"{name} of assistant messages" for name in others]
    assert choose().unused(row) == names
    path = tmp_path / "t.jinja"
    path.write_text("{% for m in messages %}{{ m.thought }}{{ m['value'] }}{% endfor %}")
    assert choose(str(path)).unused(row) == names[2:]
    assert "S\n\nT<|im_end|>" in written(choose(), CHAT | {"system": "S", "system_prompt": "T"})[0]


def test_a_message_that_is_switched_off_is_not_learned(choose, tmp_path):
    """OpenAI's and mistral-finetune's weight, ms-swift's loss, axolotl's train."""
    asked = [turn("user", "Hi"), turn("assistant", "Off"), turn("user", "?")]
    path = tmp_path / "one_block.jinja"  # marked, but not an answer a block
    path.write_text(
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }};{% endgeneration %}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    switches = (
        ("weight", 1, 0),
        ("loss_weight", 1.0, 0.0),
        ("loss", True, False),
        ("train", True, False),
    )
    for name, on, off in switches:
        messages = [*asked, turn("assistant", "On", **{name: on})]
        messages[1] = messages[1] | {name: off}
        row = {"messages": messages}
        assert written(choose(), row)[1] == ["On<|im_end|>\n"]
        assert written(choose(str(path)), row)[1] == ["On;"]
        assert written(choose(train_on="last"), row)[1] == ["On<|im_end|>\n"]
        assert written(choose(train_on="last"), {"messages": messages[:2]})[1] == []
        with pytest.raises(Refused, match="--train_on all learns all"):
            choose(train_on="all").render(row)
    with pytest.raises(Refused, match="--train_on all learns all"):
        choose(train_on="all").render({"messages": [turn("user", "?", loss=False), messages[3]]})
    off_and_null = [turn("user", "Hi", weight=None, train=True), turn("assistant", "A", loss=None)]
    assert written(choose(), {"messages": off_and_null})[1] == ["A<|im_end|>\n"]
    assert choose().unused({"messages": off_and_null}) == ["train of user messages"]


def test_an_alpaca_row_has_a_system_prompt_and_a_history(choose):
    row = ALPACA | {"system": "S", "history": [["2 + 2?", "4"], ["Sure?", "Yes"]]}
    text, learned = written(choose("chat"), row)
    said = (("system", "S"), ("user", "2 + 2?"), ("assistant", "4"), ("user", "Sure?"))
    said = (*said, ("assistant", "Yes"), ("user", "Add.\n\n1 + 1"), ("assistant", "2"))
    chat = choose().chat.whole([turn(*pair) for pair in said])
    assert text == chat and learned == [f"{answer}<|im_end|>\n" for answer in ("4", "Yes", "2")]
    text, learned = written(choose(), row)
    head, body = small_tokenizers.pair(ALPACA)[0].split("\n\n### Instruction:")
    asked = "### Instruction:\n2 + 2?\n\n### Response:\n4\n\n### Instruction:\nSure?\n\n"
    assert learned == ["4", "Yes", "2"] and text.startswith("S\n\nBelow is an instruction that")
    assert text.endswith(f"{asked}### Response:\nYes\n\n### Instruction:{body}2")
    assert text.count("Below is") == 1 and "Below is" in head
    assert written(choose(train_on="last"), row)[1] == ["2"]
    assert written(choose(system="T"), row)[0].startswith("T\n\nBelow")
    for system, history in (("", None), (None, []), (None, "[]"), ("", "")):
        same = ALPACA | {"system": system, "history": history}
        assert written(choose(), same) == written(choose(), ALPACA)
    chat = [turn("system", "S"), turn("user", "Hi"), turn("assistant", "Oh.")]
    for row in ({"messages": chat[1:], "system": "S"}, {"messages": chat, "system_prompt": "S"}):
        assert written(choose(), row) == written(choose(), {"messages": chat})
    row = {"prompt": "a ", "completion": "b", "system_prompt": "S"}
    assert written(choose(), row) == ("S\n\na b", ["b"])


def test_other_spellings_are_read_as_the_usual_ones_and_the_rest_is_named(choose):
    for usual, other in (
        (ALPACA, {"instruction": "Add.", "context": "1 + 1", "response": "2"}),  # dolly
        ({"question": "Q", "answer": "A"}, {"question": "Q", "response": "A"}),
        ({"prompt": "Q", "completion": "A"}, {"prompt": "Q", "response": "A"}),
        (CHAT, {"conversation": [turn("Human", "Hi"), turn("AI", "Oh.")]}),
        (CHAT, {"messages": [{"role": "USER", "content": "Hi"}, {"from": "Bot", "value": "Oh."}]}),
    ):
        name = row_formats.match(usual).name
        for template in (None, "chat", name):
            assert written(choose(template), other) == written(choose(template), usual)
        extra = other | {"id": 7, "empty": "", "none": None, "topics": ["x"]}
        assert choose().unused(extra) == ["id", "topics"] and choose().unused(other) == []
    row = {"prompt": "Q", "response": "A", "text": "QA"}  # as before: text
    assert choose().name(row) == "blocks" and choose().unused(row) == ["prompt", "response"]
    assert choose("{prompt}{text}").unused(row) == ["response"]


@pytest.mark.parametrize("completion", [[turn("assistant", "B")], "B"])
def test_a_conversational_prompt_is_given_and_its_completion_learned(choose, completion):
    """As TRL has it: an answer in the prompt is not learned."""
    prompt = [turn("user", "Hi"), turn("assistant", "A"), turn("user", "?")]
    row = {"prompt": prompt, "completion": completion}
    whole = choose().chat.whole([*prompt, turn("assistant", "B")])
    assert written(choose(), row) == (whole, ["B<|im_end|>\n"])
    assert written(choose(train_on="all"), row)[1] == [whole]
    assert choose().name(row) == "chat"


def call(arguments, name="weather"):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(arguments):
    found = turn("assistant", "", tool_calls=[call(arguments)])
    return [turn("user", "Oslo?"), found, turn("tool", "rain"), turn("assistant", "Yes, é.")]


TOJSON = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "CALL {{ c.function.name }} ARGS{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    "form",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments }}",
        "{{ c.function.arguments + '' }}",
        "{% if c.function.arguments is string %}{{ c.function.arguments }}"
        "{% else %}{{ c.function.arguments | tojson }}{% endif %}",
        "{ {%- for k, v in c.function.arguments.items() %}{{ k | tojson }}: {{ v | tojson }}"
        "{% endfor -%} }",
    ],
)
def test_arguments_are_written_as_json_whatever_the_template_takes(choose, tmp_path, form):
    path = tmp_path / "t.jinja"
    path.write_text(TOJSON.replace("ARGS", form))
    wanted = '<user>Oslo?;<assistant>CALL weather {"city": "Åre"};<tool>rain;<assistant>Yes, é.;'
    given = {"city": "Åre"}
    in_text = json.dumps(given, ensure_ascii=False)
    sharegpt = [{"from": "human", "value": "Oslo?"}]
    asked = json.dumps({"name": "weather", "arguments": given})
    sharegpt += [
        {"from": "function_call", "value": asked},
        {"from": "observation", "value": "rain"},
    ]
    listed = turn("assistant", "", tool_calls=json.dumps([call(in_text)]))
    old = calls(given)
    old[1] = turn("assistant", None, function_call=call(in_text)["function"])
    old[2] = turn("function", "rain", name="weather")
    older = [*old]
    older[1] = turn("assistant", "", function_call=json.dumps(call(in_text)["function"]))
    for row in (
        {"messages": calls(given)},
        {"messages": calls(in_text)},
        {"messages": [calls(0)[0], listed, *calls(0)[2:]]},
        {"messages": old},
        {"messages": older},
        {"conversations": [*sharegpt, {"from": "gpt", "value": "Yes, é."}]},
    ):
        text, learned = written(choose(str(path)), row)
        assert text == wanted and learned == ['CALL weather {"city": "Åre"};', "Yes, é.;"]
    with pytest.raises(Refused, match='field "arguments" is not JSON'):
        choose(str(path)).render({"messages": calls('{"city": "Oslo", "city": "Bergen"}')})


def test_calls_that_a_template_does_not_know_stay_text(choose):
    row = {"conversations": [{"from": "human", "value": "Hi"}]}
    row["conversations"].append({"from": "function_call", "value": '{"name": "f"}'})
    assert written(choose(), row)[1] == ['{"name": "f"}<|im_end|>\n']


def trl_templates(word):
    found = importlib.util.find_spec("trl")
    folders = found.submodule_search_locations if found else ()
    paths = [path for folder in folders for path in Path(folder).glob("chat_templates/*.jinja")]
    return [path for path in sorted(paths) if word in path.read_text(encoding="utf-8")]


def test_every_template_of_trl_heeds_the_switches(choose):
    """Also those marked in other parts than an answer each."""
    questions = [turn("user", f"Q{i}") for i in range(3)]
    answers = [turn("assistant", "ONE", train=False), turn("assistant", "TWO"), turn("gpt", "END")]
    row = {"messages": [m for pair in zip(questions, answers, strict=True) for m in pair]}
    for path in trl_templates("messages"):
        for train_on, wanted in (
            ("assistant", [False, True, True]),
            ("last", [False, False, True]),
        ):
            if path.stem.startswith(("idefics3", "llava_next", "smolvlm")):
                continue  # they take lists of pictures and texts only
            texts = choose(str(path), train_on=train_on).render(row)
            learned = "".join(text.text[a:b] for text in texts for a, b in text.spans)
            assert [word in learned for word in ("ONE", "TWO", "END")] == wanted, path


@pytest.mark.parametrize("path", trl_templates("tool_calls"), ids=lambda path: path.stem)
def test_arguments_in_text_give_what_transformers_makes_of_the_object(choose, path):
    """Or of the text, where a template cannot take an object."""
    source = path.read_text(encoding="utf-8")
    given = {"city": "Åre", "n": [1, {"deep": None}]}
    formatter, wanted = choose(str(path)), None
    names = formatter.chat.names
    for arguments in (given, json.dumps(given, ensure_ascii=False)):
        try:
            (text,), _ = render_jinja_template([calls(arguments)], chat_template=source, **names)
        except Exception:  # whatever a template raises
            continue
        if str(given) not in text:
            wanted = text if wanted is None else wanted
    for arguments in (given, json.dumps(given, ensure_ascii=False)):
        row = {"messages": calls(arguments)}
        if wanted is None:
            with pytest.raises(Refused):
                formatter.render(row)
        else:
            shown = formatter._with_calls(row_formats.chats.conversation(row), {"tools": None})
            assert formatter.chat.whole(shown) == wanted
