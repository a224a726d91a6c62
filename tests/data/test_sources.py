"""Rows from files, and directories: in order, faults by file and line."""

import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import sources
from fsdp_qlora.data.sources import BadRow, RowPlace, TextPiece
from fsdp_qlora.errors import UserError

ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"q{i} é", "answer": f"a{i}"} for i in range(5)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def found(path, split=None, **wanted):
    """Places and rows."""
    return list(sources.read(sources.find(str(path), TrainConfig(), split, **wanted)))


def read(path, **wanted):
    return [row for _, row in found(path, **wanted)]


def faults(path):
    return [f"{place}: {row.fault}" for place, row in found(path) if isinstance(row, BadRow)]


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
        ("wrapped.json", json.dumps({"version": "1.0", "data": ROWS})),
        ("wrapped.jsonl", json.dumps({"data": ROWS}, indent=1) + "\n"),
        ("wrapped.json", "\n" + json.dumps({"data": ROWS, "info": {}}, indent=2)),
    ],
)
def test_a_json_file_gives_all_its_rows_in_order_whatever_its_form(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path / name) == ROWS


def csv_text(separator=","):
    file = io.StringIO()
    writer = csv.DictWriter(file, ROWS[0], delimiter=separator)
    writer.writeheader()
    writer.writerows([*ROWS[:-1], {"question": 'a "b",\nc;d', "answer": "\te"}])
    return file.getvalue()


@pytest.mark.parametrize(("name", "separator"), [("x.csv", ","), ("x.csv", ";"), ("x.tsv", "\t")])
def test_a_csv_file_gives_its_rows_with_the_line_each_begins_in(tmp_path, name, separator):
    text = csv_text(separator).replace("\r\n", "\n") + f"last{separator}{'x' * 200_000}\n\n"
    (tmp_path / name).write_text("\ufeff" + text)
    rows = [*ROWS[:-1], {"question": 'a "b",\nc;d', "answer": "\te"}]
    rows.append({"question": "last", "answer": "x" * 200_000})
    assert read(tmp_path / name) == rows
    assert [place.number for place, _ in found(tmp_path / name)] == [2, 3, 4, 5, 6, 8]


def test_a_name_of_a_csv_column_may_hold_commas_and_lines(tmp_path):
    (tmp_path / "x.csv").write_text('"q";"a";"note, if any, or\nnot, ever"\n1,5;2;3\n')
    assert read(tmp_path / "x.csv") == [{"q": "1,5", "a": "2", "note, if any, or\nnot, ever": "3"}]


def test_faults_of_a_csv_file_have_their_lines(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'a,b\n1,2\n3\n4,"5"6\n\xff,7\n8,9\n"10,11\n')
    assert [fault.partition("x.csv:")[2] for fault in faults(tmp_path / "x.csv")] == [
        "3: has 1 cells (want 2, as in the first line)",
        "4: is not CSV (',' expected after '\"')",
        "5: is not UTF-8",
        "7: is not CSV (unexpected end of data)",
    ]
    assert read(tmp_path / "x.csv")[4] == {"a": "8", "b": "9"}


def test_a_text_comes_in_pieces_that_together_are_the_text(tmp_path):
    from pydoc_data.topics import topics

    text = "".join(topics.values()).replace("\r", "")
    (tmp_path / "x.txt").write_bytes(text.replace("\n", "\r\n").encode())
    pieces = read(tmp_path / "x.txt")
    assert len(pieces) > 5 and all(isinstance(piece, TextPiece) for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.text[-1] == "\n" and not piece.text[0].isspace() for piece in pieces[1:-1])
    line = 1 + pieces[0].text.count("\n")
    assert found(tmp_path / "x.txt")[1][0] == RowPlace(str(tmp_path / "x.txt"), line)


def test_a_text_of_one_long_line_is_read(tmp_path):
    text = "é漢" * 900_000
    (tmp_path / "x.txt").write_text(text)
    assert "".join(piece.text for piece in read(tmp_path / "x.txt")) == text


def test_compressed_files_are_read(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    frames = [pyarrow.compress(line.encode(), "zstd", asbytes=True) for line in LINES.splitlines(1)]
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(frames))
    assert read(tmp_path / "x.jsonl.gz") == read(tmp_path / "x.jsonl.zst") == ROWS


def test_arrow_files_give_all_their_rows_in_order(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "x.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as file:
        file.write_table(table)
    assert read(tmp_path / "x.parquet") == read(tmp_path / "x.arrow") == ROWS
    assert str(found(tmp_path / "x.parquet")[4][0]).endswith("x.parquet row 5")
    kind = pyarrow.map_(pyarrow.string(), pyarrow.int64())  # an object, whatever its keys
    maps = pyarrow.array([[("x", 1), ("y", 2)], [("z", 3)]], type=kind)
    parquet.write_table(pyarrow.table({"m": maps}), tmp_path / "m.parquet")
    assert read(tmp_path / "m.parquet") == [{"m": {"x": 1, "y": 2}}, {"m": {"z": 3}}]


def test_arrow_gives_rows_without_the_nulls_that_it_invents(tmp_path):
    """As JSON lines of the same rows, whatever the writer made of their structs."""
    datasets = pytest.importorskip("datasets")
    arguments = [{"city": "Oslo"}, {"left": 2, "right": [{"a": 1}, {"b": {"c": "x"}}]}]
    rows = [{"calls": [{"name": "f", "arguments": a}], "n": None, "ids": [1]} for a in arguments]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    loaded = datasets.load_dataset(
        "json", data_files=str(tmp_path / "x.jsonl"), split="train", cache_dir=str(tmp_path / "c")
    )  # of version 5 on, a column of JSON where keys differ
    loaded.to_parquet(tmp_path / "y.parquet")
    own = f"import datasets\ndef rows(*_): return datasets.load_from_disk('{tmp_path / 'saved'}')"
    (tmp_path / "own.py").write_text(own)
    for name in ("x.parquet", "saved", "y.parquet", "own.py:rows"):
        assert read(tmp_path / name) == read(tmp_path / "x.jsonl") == rows


def test_several_files_and_directories_are_read_in_order(tmp_path):
    parts = tmp_path / "parts"
    (parts / "deep").mkdir(parents=True)
    (parts / "b.jsonl").write_text(LINES)
    (parts / "deep" / "a.json").write_text(json.dumps(ROWS[:2]))
    for name in ("README.md", ".hidden.jsonl", "state.json", "dataset_info.json"):
        (parts / name).write_text("{}")
    (tmp_path / "one, two.csv").write_text("question,answer\nq,a\n")
    assert read(parts) == [*ROWS, *ROWS[:2]]
    assert read(f"{parts}, {parts / 'b.jsonl'}") == [*ROWS, *ROWS[:2], *ROWS]
    assert read(tmp_path / "one, two.csv") == [{"question": "q", "answer": "a"}]


def test_what_the_datasets_library_saves_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == ROWS


def test_the_lines_behind_a_bad_one_are_read(tmp_path):
    """What faults are told of is in bad_input/rows."""
    good = LINES.encode().splitlines(keepends=True)
    for data, words in ((b"{", "x.jsonl:3: is not JSON"), (b'"\xff"', "x.jsonl:3: is not UTF-8")):
        (tmp_path / "x.jsonl").write_bytes(b"".join([*good[:2], data + b"\n", *good[2:]]))
        (fault,) = faults(tmp_path / "x.jsonl")
        assert words in fault and len(read(tmp_path / "x.jsonl")) == 6
        assert read(tmp_path / "x.jsonl")[3:] == ROWS[2:]


@pytest.mark.parametrize(
    ("text", "numbers", "fault"),
    [
        ('[{"a": 1}, 3]', [-1, -2], None),
        ('[{"a": 1}, {"a": 1, "a": 2}, 3]', [1], "x.json:1: is not JSON (a field is given twice"),
        ('[\n{"a": 1},\n\n{"a": NaN},\n3]', [1], "x.json:1: is not JSON (NaN is"),
        ('[\n{"a": 1},\n{"a" 2}]', [1], "Expecting ':' delimiter: line 3 column 6"),
        ("[1\n]x", [1], "Extra data: line 2 column 2"),
        ("[1\n", [1], "Expecting ',' delimiter: line 2"),
        ("[" * 100_000, [1], "is not JSON"),
        (b'\n[\n"\xff"]', [2], "x.json:2: is not UTF-8"),
        ("[]\n", [], None),
        ('{"data": [\n{"a": 1},\n{"a" 2}\n]}\n', [1], "Expecting ':' delimiter: line 3 column 6"),
        ('{\n "a": 1,\n "data": [1]\n}', [1], None),
        ('{"a": [], "data": [{"b": 1}]}\n', [1], None),
        ('{"data": [{"b": 1}]}\n{"data": [{"b": 2}]}\n', [1, 2], None),
        ('{"a": NaN}\n{"a": 2}', [1, 2], "x.json:1: is not JSON (NaN"),
    ],
)
def test_rows_of_a_list_have_their_number_and_a_fault_its_line(tmp_path, text, numbers, fault):
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert [place.number for place, _ in found(tmp_path / "x.json")] == numbers
    assert [fault in text for text in faults(tmp_path / "x.json")] == [True] * bool(fault)


def test_a_strange_name_gets_the_list_of_those_known():
    for name in ("my_rows.zip", "/absent/rows", "./a/b"):
        with pytest.raises(UserError, match="alpaca alpaca_sample guanaco sql orca_math dummy"):
            read(name)


def test_mutated_files_of_every_format_give_rows_or_one_line(tmp_path):
    """Only UserError and BadRow may come out, whatever 600 damaged files hold."""
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "good.parquet")
    with pyarrow.ipc.new_stream(str(tmp_path / "good.arrow"), table.schema) as file:
        file.write_table(table)
    contents = {
        "x.json": json.dumps(ROWS, indent=1).encode(),
        "x.csv": csv_text().encode(),
        "x.txt": LINES.encode(),
        "x.jsonl.gz": gzip.compress(LINES.encode()),
        "x.jsonl.zst": pyarrow.compress(LINES.encode(), "zstd", asbytes=True),
        "x.parquet": (tmp_path / "good.parquet").read_bytes(),
    }
    chance, outcomes = random.Random(3), Counter()
    for name, content in contents.items():
        for _ in range(100):
            changed = bytearray(content)
            for _ in range(chance.randint(1, 4)):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            stop = chance.choice([None, None, chance.randrange(len(changed))])
            (tmp_path / name).write_bytes(changed[:stop])
            try:
                lines = faults(tmp_path / name)
            except UserError as error:
                lines = [str(error)]
            assert all(str(tmp_path / name) in line and "\n" not in line for line in lines)
            outcomes[name, bool(lines)] += 1
    assert sum(outcomes.values()) == 600
    assert all(outcomes[name, True] > 10 for name in contents)


def test_a_file_is_told_by_what_it_holds_and_a_large_one_by_its_time(tmp_path, monkeypatch):
    def fingerprint(text):
        (tmp_path / "x.jsonl").write_text(text)
        return sources.find(str(tmp_path / "x.jsonl"), TrainConfig(), None)[0].fingerprint()

    assert fingerprint(LINES) == fingerprint(LINES) != fingerprint(LINES[:-1] + " ")
    monkeypatch.setattr(sources, "MOST_HASHED_BYTES", 10)
    before = fingerprint(LINES)
    os.utime(tmp_path / "x.jsonl", ns=(1, 1))
    assert fingerprint(LINES) != before and str(tmp_path) in before


def fill_hub_cache(cache, repo, config, splits):
    """Leave a data set as the datasets library keeps it once it has been fetched."""
    import datasets

    org, name = repo.split("/")
    place = cache / f"{org}___{name}" / config / "0.0.0" / "0123456789abcdef"
    place.mkdir(parents=True)
    tables = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    info = next(iter(tables.values())).info
    info.builder_name, info.dataset_name, info.config_name = "json", name, config
    info.version = datasets.Version("0.0.0")
    info.splits = datasets.SplitDict()
    for split, table in tables.items():
        path = place / f"{name}-{split}.arrow"
        with pyarrow.ipc.new_stream(str(path), table.data.table.schema) as file:
            file.write_table(table.data.table)
        size = path.stat().st_size
        info.splits.add(datasets.SplitInfo(split, size, len(table), dataset_name=name))
    info.write_to_directory(str(place))


def test_names_of_the_hub_have_configurations_and_splits(tmp_path):
    """The real library, its cache filled by hand, in a process that has no network."""
    numbered = [{"text": str(i)} for i in range(1010)]
    fill_hub_cache(tmp_path, "org/set", "small", {"train": ROWS, "test": ROWS[:2]})
    fill_hub_cache(tmp_path, sources.HUB_SETS["alpaca"].repo, "default", {"train": ROWS})
    fill_hub_cache(tmp_path, sources.HUB_SETS["sql"].repo, "default", {"validation": numbered})
    code = """
import json, sys
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.data import sources
out = []
for name, split, settings in [
    ("org/set:small", None, {}), ("org/set:small:test", None, {}),
    ("org/set::train[1:3]", None, {}), ("org/set:small", "test", {}),
    ("alpaca_sample", None, {"dataset_samples": 3}), ("alpaca", None, {"dataset_samples": 3}),
    ("sql", None, {"seed": 1}), ("sql", None, {"seed": 2}),
    ("org/set:small:test,org/set:small", None, {}),
    ("org/set:small:train", "test", {}),
]:
    found = sources.find(name, TrainConfig(**settings), split)
    prints = [source.fingerprint() for source in found]
    pairs = [(str(p), row) for source in found for p, row in source.read()]
    out.append([prints, pairs])
print(json.dumps(out))
"""
    env = os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    prints, pairs = zip(*json.loads(done.stdout), strict=True)
    rows = [[row for _, row in part] for part in pairs]
    assert rows[:6] == [ROWS, ROWS[:2], ROWS[1:3], ROWS[:2], ROWS[:3], ROWS]
    assert [len(part) for part in rows[6:8]] == [10, 10] and rows[6] != rows[7]
    assert rows[8] == [*ROWS[:2], *ROWS] and rows[9] == ROWS[:2]
    assert pairs[1][1][0] == "org/set:small:test row 2"
    assert len({json.dumps(part) for part in prints}) == len(prints) - 2
    assert prints[1] == prints[3] == prints[9] and None not in prints[0]


OWN = """
def get_custom_dataset(dataset_config, tokenizer, split):
    assert dataset_config.file.endswith("own.py") and dataset_config.test_split == "validation"
    yield {"input_ids": [1, 2], "labels": [-100, 2], "split": split, "tokenizer": tokenizer}

class Array(list):
    def tolist(self):
        return list(self)

def mine(dataset_config, tokenizer, split):
    return [{"input_ids": Array([3, 4])}, 7]

def broken(dataset_config, tokenizer, split):
    yield {"text": "a"}
    raise KeyError("oh")
"""


def test_a_function_of_the_users_own_is_called_as_llama_recipes_does(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    first = {"input_ids": [1, 2], "labels": [-100, 2], "tokenizer": "T"}
    assert read(path, tokenizer="T") == [first | {"split": "train"}]
    (row,) = read(f"{path}:get_custom_dataset", split="mine", tokenizer="T")
    assert row["split"] == "mine"
    assert read(f"{path}:mine") == [{"input_ids": [3, 4]}, 7]
    assert type(read(f"{path}:mine")[0]["input_ids"]) is list
    assert sources.find(f"{path}:mine", TrainConfig(), None)[0].fingerprint() is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("own.py:absent", OWN, "own.py:absent: is no function there"),
        ("own.py:broken", OWN, r"own.py:15: KeyError: 'oh'"),
        ("own.py", "import no_such_module_here", "own.py:1: ModuleNotFoundError"),
        ("own.py", "def x(:", "SyntaxError"),
        ("own.py", "def get_custom_dataset(a, b): pass", "own.py.*TypeError"),
        ("own.py", "def get_custom_dataset(a, b, c): pass", "own.py.*'NoneType' object is not"),
        ("absent.py:f", "", "absent.py: does not exist"),
    ],
)
def test_a_fault_of_the_users_own_code_is_one_line_with_its_place(tmp_path, name, text, words):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


ENDS = ("jsonl", "jsonl.gz", "json", "csv", "tsv.gz", "parquet")


@pytest.mark.parametrize("name", [f"x.{end}" for end in ENDS])
def test_a_row_that_would_fill_the_host_is_refused(tmp_path, monkeypatch, name):
    """Before it is whole in memory where it is a line; many rows that are longer in all are not."""
    monkeypatch.setattr(sources, "LONGEST_ROW", 9000)
    monkeypatch.setattr(sources, "LONGEST_TABLE", 20_000)
    path, opened = tmp_path / name, gzip.open if name.endswith("gz") else open
    for sizes in ((5000,) * 3, (50, 90_000)):
        rows = [{"prompt": "a", "completion": "b" * size} for size in sizes]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        text = json.dumps(rows) if name == "x.json" else text  # a table may be one line
        if "sv" in name:
            text = "prompt\tcompletion\n" + "".join("\t".join(r.values()) + "\n" for r in rows)
        with opened(path, "wt") as file:
            file.write(text)
        if name == "x.parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        if len(sizes) == 3:
            assert [row for _, row in sources.read_file(path)] == rows
            continue
        with pytest.raises(UserError, match=r"is longer than [\d,]+ characters"):
            list(sources.read_file(path))
