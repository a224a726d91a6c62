"""The audit of the rows in the report, and the answers of all prompts side by side."""

import json

from tests.report_runs import CONFIG, page_of, step_line, write_run

AUDIT = {
    "sources": ["a<b>.jsonl"],
    "num_rows": 1200,
    "num_train": 1100,
    "num_held_out": 97,
    "num_cut": 3,
    "num_tokens_cut": 250,
    "num_empty": 0,
    "epoch_tokens": 54_321,
    "padding_share": {"batches": 0.125, "packed": 0.01},
    "examples": {"cut": ["a<b>.jsonl:7", "a<b>.jsonl:9"], "empty": []},
    "notes": ["the end of text is never learned"],
}


def test_the_audit_stands_in_the_report_with_the_places_of_what_is_lost(tmp_path):
    run = write_run(tmp_path / "run", [step_line(1, 2.0)], summary={"data": AUDIT})
    old = write_run(tmp_path / "old", [step_line(1, 2.0)])
    page = page_of(run, old, out=tmp_path / "both")
    assert page.tables["Data"] == {
        "sources": [("a<b>.jsonl", None)],
        "rows": [("1,200", 1200)],
        "learned": [("1,100", 1100)],
        "held out": [("97", 97)],
        "rows cut at the context": [("3", 3)],
        "tokens lost by that": [("250", 250)],
        "tokens of an epoch": [("54,321", 54_321)],
        "padding in batches of like length": [("12.5%", None)],
        "padding if packed": [("1.0%", None)],
    }
    assert "run: the end of text is never learned" in page.words
    assert "run: cut: a<b>.jsonl:7, a<b>.jsonl:9" in page.words and "empty:" not in page.words
    assert "Data" not in page_of(old, out=tmp_path / "one").tables


def test_every_prompt_has_a_row_with_its_answers(tmp_path):
    run = write_run(tmp_path / "run", [step_line(1, 2.0)], config=CONFIG)
    with (run / "metrics.jsonl").open("a") as file:
        for when in ("before", "after"):
            for name, expected in (("p", "the truth"), ("q", None)):
                values = {"prompt": name, "answer": f"{name} {when}", "expected": expected}
                file.write(json.dumps({"event": "sample", "when": when, **values}) + "\n")
    found = page_of(run, out=run).tables["Answers"]
    assert [text for text, _ in found["p"]] == ["p before", "p after", "the truth"]
    assert [text for text, _ in found["q"]] == ["q before", "q after", "–"]
