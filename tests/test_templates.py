"""What a row's columns make of it."""

import pytest

from fsdp_qlora.data import templates

ALPACA = {"instruction": "Add.", "input": "1 + 1", "output": "2"}


def test_an_alpaca_row_puts_instruction_and_input_into_the_prompt_and_output_into_the_completion():
    prompt, completion = templates.render(ALPACA)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n" in prompt
    assert completion == "2"


@pytest.mark.parametrize("row", [ALPACA | {"input": ""}, ALPACA | {"input": None}])
def test_an_alpaca_row_without_input_has_no_input_section(row):
    prompt, _ = templates.render(row)
    assert "Input" not in prompt and "paired with" not in prompt


def test_a_question_row_shows_its_context_only_if_there_is_one():
    row = {"question": "Who?", "answer": "Ada"}
    assert templates.render(row) == ("###Question:\nWho?\n###Answer:\n", "Ada")
    prompt, _ = templates.render(row | {"context": "a table"})
    assert prompt == "###Context:\na table\n###Question:\nWho?\n###Answer:\n"


def test_prompt_and_completion_are_taken_as_they_stand():
    assert templates.render({"prompt": "a ", "completion": " b"}) == ("a ", " b")


def test_plain_text_is_all_completion():
    assert templates.render({"text": "Once upon"}) == ("", "Once upon")


def test_a_guanaco_dialogue_is_learned_from_the_first_answer_on():
    row = {"text": "### Human: Hi.### Assistant: Hello.### Human: Bye.### Assistant: Bye."}
    prompt, completion = templates.render(row)
    assert prompt == "### Human: Hi.### Assistant:"
    assert completion == " Hello.### Human: Bye.### Assistant: Bye."


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "input": "", "output": ""},
        {"question": "Q", "answer": ""},
        {"prompt": "Q", "completion": ""},
        {"text": "### Human: Q\n### Assistant: A"},
    ],
)
def test_a_question_asked_like_the_rows_gives_the_prompt_such_a_row_would_have(row):
    assert templates.ask("Q", row) == templates.render(row)[0]


def test_a_question_asked_of_plain_text_rows_is_itself():
    assert templates.ask("Once", {"text": "anything"}) == "Once"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([1], "is a list (want an object with named fields)"),
        (None, "is null"),
        ({}, "has fields none (want instruction+output | question+answer"),
        ({"a": 1, "b": 2}, "has fields a, b"),
        (ALPACA | {"output": None}, 'field "output" is null (want text)'),
        (ALPACA | {"output": 7}, 'field "output" is a number (want text)'),
        (ALPACA | {"output": True}, 'field "output" is true or false (want text)'),
        (ALPACA | {"input": ["x"]}, 'field "input" is a list (want text)'),
        (ALPACA | {"instruction": {"a": "b"}}, 'field "instruction" is an object (want text)'),
        ({"text": "\ud800"}, 'field "text" holds half a surrogate pair'),
    ],
)
def test_a_bad_row_is_described_by_its_field(row, words):
    assert words in templates.problem(row)


@pytest.mark.parametrize(
    "row", [ALPACA, ALPACA | {"input": None}, ALPACA | {"id": 3}, {"text": ""}]
)
def test_a_good_row_has_no_problem(row):
    assert templates.problem(row) is None
