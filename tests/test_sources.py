"""Rows from files: good ones in order, bad ones named by file and line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fsdp_qlora.data import sources
from fsdp_qlora.errors import UserError

ROOT = Path(__file__).parent.parent
ROWS = [{"question": f"q{i} é", "answer": f"a{i}"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path, num_samples=2):
    return sources.read(str(path), num_samples, seed=0)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.jsonl", LINES),
        ("lines.json", LINES),
        ("LINES.JSONL", LINES),
        ("list.json", json.dumps(ROWS)),
        ("indented.json", "\n " + json.dumps(ROWS, indent=2)),
        ("crlf.jsonl", LINES.replace("\n", "\r\n")),
        ("blank_lines.jsonl", LINES.replace("\n", "\n\n") + "  \n"),
        ("no_final_newline.jsonl", LINES.rstrip()),
        ("bom.jsonl", "\ufeff" + LINES),
        ("bom.json", "\ufeff" + json.dumps(ROWS)),
    ],
)
def test_a_json_file_gives_all_its_rows_in_order_whatever_its_form(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path / name) == ROWS


def test_a_parquet_file_gives_all_its_rows_in_order(tmp_path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == ROWS


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "x.jsonl:3: is not JSON (column 2"),
        (b'{"question": "q"} {"answer": "a"}', "x.jsonl:3: is not JSON (column 19"),
        (b'{"question": "q", "answer": NaN}', "NaN is not a JSON value"),
        (b'{"question": "q", "answer": "a", "answer": "b"}', "a field is given twice"),
        (b'{"question": "\xff", "answer": "a"}', "x.jsonl:3: is not UTF-8 at byte 14"),
        (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}", "x.jsonl:3: is not JSON we can"),
        (b"[" * 100_000, "x.jsonl:3: is not JSON"),
        (b'{"question": "q", "answer": null}', 'x.jsonl:3 field "answer" is null (want text)'),
        (b'"text"', "x.jsonl:3 is text (want an object"),
        (b'{"question": "q\x00", "answer": "a"}', "x.jsonl:3: is not JSON"),
        (b"<!DOCTYPE html>", "x.jsonl:3: is not JSON (column 1"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, data, words):
    good = LINES.encode().splitlines(keepends=True)[:2]
    (tmp_path / "x.jsonl").write_bytes(b"".join(good) + data + b"\n")
    with pytest.raises(UserError) as caught:
        read(tmp_path / "x.jsonl")
    assert words in str(caught.value) and caught.value.code == 2


def test_bad_rows_are_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text(LINES + '{"a": 1}\n' * 3)
    with pytest.raises(UserError, match=r"x\.jsonl:6 has fields a .* and 2 more bad rows"):
        read(tmp_path / "x.jsonl")


def test_a_bad_row_of_a_list_is_named_by_its_number(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([*ROWS, 3]))
    with pytest.raises(UserError, match=r"x\.json row 6 is a number"):
        read(tmp_path / "x.json")


def test_a_syntax_error_of_a_list_is_named_by_its_line(tmp_path):
    (tmp_path / "x.json").write_text('[\n{"text": "a"},\n{"text" "b"}]')
    with pytest.raises(UserError, match="line 3 column"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["", "\n \n", "[]"])
def test_a_file_without_rows_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="holds no rows"):
        read(tmp_path / "x.json")


def test_utf16_is_refused_by_name(tmp_path):
    (tmp_path / "x.jsonl").write_text(LINES, encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16"):
        read(tmp_path / "x.jsonl")


def test_a_broken_parquet_file_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read(tmp_path / "x.parquet")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name in ("pipe.jsonl", "folder.jsonl", "loop.jsonl"):
        with pytest.raises(UserError, match="is not a regular file"):
            read(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "absent.jsonl")


def test_a_misspelt_name_is_corrected_and_a_strange_one_gets_the_list():
    with pytest.raises(UserError, match="did you mean alpaca_sample"):
        read("alpca_sample")
    with pytest.raises(UserError, match="alpaca alpaca_sample guanaco sql orca_math dummy"):
        read("my_rows.zip")


def test_a_named_set_that_cannot_be_fetched_is_an_error_of_the_environment(tmp_path):
    """Run in a process of its own: the hub library reads its settings when it is imported."""
    code = (
        "from fsdp_qlora.data import sources\n"
        "from fsdp_qlora.errors import UserError\n"
        "try: sources.read('alpaca', 1, 0)\n"
        "except UserError as error: print(error.code, error)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("3 dataset alpaca: yahma/alpaca-cleaned cannot be had")
    assert done.stdout.count("\n") == 1


def test_reading_rows_needs_neither_torch_nor_transformers():
    code = (
        "import sys, fsdp_qlora.data.sources\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
