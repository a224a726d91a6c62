"""Bad data: names, files, rows."""

import gzip
import json
import os
import tarfile
import zipfile

import pyarrow
from pyarrow import parquet

from fsdp_qlora.errors import ENVIRONMENT
from tests.bad_input.case import LINES, ROWS, Case, Place
from tests.bad_input.models import loop

GOOD = "".join(LINES).encode()


def line(content: bytes | str):
    """Put a bad line after the fifth good one."""
    data = content.encode() if isinstance(content, str) else content
    first, rest = "".join(LINES[:5]).encode(), "".join(LINES[5:]).encode()
    return lambda place: place.rows.write_bytes(first + data + b"\n" + rest)


def row(**fields: object):
    """The same, with fields of a row changed; ... takes one away."""
    table = {key: value for key, value in (ROWS[0] | fields).items() if value is not ...}
    return line(json.dumps(table))


def whole(content: bytes | str):
    """The file holds something else."""
    return lambda place: place.rows.write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def file(name: str, content: bytes):
    """Another file, which the flags name."""
    return lambda place: (place.root / name).write_bytes(content)


def instead(make):
    """Something else stands where the file was."""

    def damage(place: Place) -> None:
        place.rows.unlink()
        make(place.rows)

    return damage


def archives(place: Place) -> None:
    """Archives that would write outside, were they unpacked."""
    with zipfile.ZipFile(place.root / "x.zip", "w") as packed:
        packed.writestr("../../was-unpacked.jsonl", GOOD)
    with tarfile.open(place.root / "x.tar.gz", "w:gz") as packed:
        packed.add(place.rows, "../../was-unpacked.jsonl")


def bad_parquet(place: Place) -> None:
    """A column that is not UTF-8."""
    text = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": text}), place.root / "x.parquet")


def empty_directory(place: Place) -> None:
    """A directory without rows."""
    (place.root / "none").mkdir()
    (place.root / "none" / "README.md").write_text("rows will come")


def parts(place: Place) -> None:
    """A directory whose second file is bad."""
    (place.root / "parts").mkdir()
    (place.root / "parts" / "a.jsonl").write_bytes(GOOD)
    (place.root / "parts" / "b.jsonl").write_bytes(GOOD + b"{")


def many_bad(path_rows: int):
    """Only bad rows."""
    return whole("{}\n" * path_rows)


def data(name: str) -> tuple[str, ...]:
    """Flags that name another data set."""
    return (f"--dataset={name}",)


def chat(**message: object) -> str:
    """A conversation with one odd message."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"} | message]
    return json.dumps({"messages": messages})


SIX = "rows.jsonl:6: "
CSV, TXT = data("{root}/x.csv"), data("{root}/x.txt")
LONG = ROWS[0] | {"prompt": "x " * 500}
CASES = [
    Case("no such file", "does not exist", data("{root}/none.jsonl")),
    Case("no such name", "did you mean alpaca_sample?", data("alpca_sample")),
    Case("no known kind of file", "want a .jsonl", data("my_rows.zip")),
    Case("only commas", "want a .jsonl", data(",,")),
    Case("three parts", "want a .jsonl", data("a/b/c")),
    Case("home of nobody", "want a .jsonl", data("~nobody-here/x")),
    Case("upward path", "does not exist", data("../../x.jsonl")),
    Case("zero byte", "must be printable", data("x\0y.jsonl")),
    Case("4,096 letters", "", data("x" * 4096)),
    Case("4,096 letters and a suffix", "does not exist", data("x" * 4096 + ".jsonl")),
    Case("not in the hub's cache", "cannot be had", data("org/absent"), code=ENVIRONMENT),
    Case("address", "does not exist", data("https://example.org/rows.jsonl")),
    Case("own function in no file", "does not exist", data("{root}/own.py:rows")),
    Case("second of two absent", "does not exist", data("{root}/rows.jsonl,{root}/b.jsonl")),
    Case("no directory of rows", "holds no file", data("{root}/none"), empty_directory),
    Case("second file of a directory", "b.jsonl:13: is not JSON", data("{root}/parts"), parts),
    Case("a directory for a file", "holds no file", (), instead(os.mkdir)),
    Case("a pipe", "is not a regular file", (), instead(os.mkfifo)),
    Case("a device", "is not a regular", (), instead(lambda p: p.symlink_to("/dev/zero"))),
    Case("a link to itself", "is not a regular file", (), instead(loop)),
    Case("a zip", "its name tells no format", data("{root}/x.zip"), archives),
    Case("a tar", "its name tells no format", data("{root}/x.tar.gz"), archives),
    Case("a zip called jsonl", "rows.jsonl:1: is not", (), whole(b"PK\3\4" + bytes(99))),
    Case("empty", "holds no rows", (), whole("")),
    Case("blank lines", "holds no rows", (), whole("\n \n\n")),
    Case("empty list", "holds no rows", (), whole("[]")),
    Case("UTF-16", "rows.jsonl:1: is not UTF-8", (), whole(GOOD.decode().encode("utf-16"))),
    Case("not UTF-8", SIX + "is not UTF-8", (), line(b'{"prompt": "\xff"}')),
    Case("zero bytes", SIX + "is not JSON", (), line(b'{"prompt": "\0"}')),
    Case("half a surrogate pair", "half a surrogate pair", (), line(r'{"text": "\ud800"}')),
    Case("open brace", SIX + "is not JSON (Expecting property name", (), line("{")),
    Case("two objects", SIX + "is not JSON (Extra data", (), line('{"text": "a"} {"text": "b"}')),
    Case("single quotes", SIX + "is not JSON", (), line("{'prompt': 'a'}")),
    Case("NaN", "NaN is not a JSON value", (), line('{"text": NaN}')),
    Case(
        "number of 5,000 digits", SIX + "is not JSON (Ex", (), line('{"text": ' + "9" * 5000 + "}")
    ),
    Case("100,000 brackets", SIX + "is not JSON", (), line('{"text": ' + "[" * 100_000)),
    Case("field twice", "a field is given twice", (), line('{"text": "a", "text": "b"}')),
    Case("page", "rows.jsonl:1: is not JSON", (), whole("<!DOCTYPE html>")),
    Case("pointer", "rows.jsonl:1: is not JSON", (), whole("version https://git-lfs.github.com\n")),
    Case("number for a row", SIX + "is a number", (), line("7")),
    Case("text for a row", SIX + "is text", (), line('"text"')),
    Case("null for a row", SIX + "is null", (), line("null")),
    Case("no answer", SIX + "has fields prompt", (), row(completion=...)),
    Case("answer null", 'field "completion" is null (want text)', (), row(completion=None)),
    Case("answer a number", 'field "completion" is a number', (), row(completion=7)),
    Case("answer a list", 'field "completion" is a list', (), row(completion=["a"])),
    Case("answer an object", "is an object (want text)", (), row(completion={"a": "b"})),
    Case("answer true", "is true or false (want text)", (), row(completion=True)),
    Case("no fields", "has fields none", (), line("{}")),
    Case("all rows bad", "and 995 more bad rows", (), many_bad(1200)),
    Case("no messages", "is an empty list", (), line('{"messages": []}')),
    Case("messages as text", "is text (want a list", (), line('{"messages": "a"}')),
    Case("unknown role", "message 2 has role robot", (), line(chat(role="robot"))),
    Case("message without words", "content is null", (), line(chat(content=None))),
    Case("ids as text", "is not a list of whole", (), line('{"input_ids": ["1"]}')),
    Case("negative ids", "that is no token", (), line('{"input_ids": [-1]}')),
    Case("ids beyond the embedding", "token id 640", (), line('{"input_ids": [640, 640]}')),
    Case("more labels than ids", "entries and", (), line('{"input_ids": [1], "labels": []}')),
    Case("no row within the context", "12 rows", (), whole((json.dumps(LONG) + "\n") * 12)),
    Case("list cut off", "is not JSON (Expecting", (), whole("[\n" + json.dumps(ROWS[0]) + "\n")),
    Case(
        "cells missing", "x.csv:3: has 1 cells", CSV, file("x.csv", b"prompt,completion\na,b\nc\n")
    ),
    Case("column twice", "must hold names of columns", CSV, file("x.csv", b"text,text\na,b\n")),
    Case("csv not UTF-8", "x.csv:2: is not UTF-8", CSV, file("x.csv", b"text\n\xff\n")),
    Case("csv of other columns", "x.csv:2: has fields", CSV, file("x.csv", b"a,b\n1,2\n")),
    Case("text not UTF-8", "x.txt:1: is not UTF-8", TXT, file("x.txt", b"good\nb\xffd\n")),
    Case("empty text", "holds no rows", TXT, file("x.txt", b"")),
    Case(
        "gzip cut off",
        "is damaged",
        data("{root}/x.jsonl.gz"),
        file("x.jsonl.gz", gzip.compress(GOOD)[:-9]),
    ),
    Case("no gzip", "is damaged", data("{root}/x.jsonl.gz"), file("x.jsonl.gz", GOOD)),
    Case("no zstd", "is damaged", data("{root}/x.jsonl.zst"), file("x.jsonl.zst", GOOD)),
    Case("no parquet", "not a readable parquet", data("{root}/x.parquet"), file("x.parquet", GOOD)),
    Case("parquet not UTF-8", "not a readable parquet", data("{root}/x.parquet"), bad_parquet),
    Case("no arrow", "x.arrow", data("{root}/x.arrow"), file("x.arrow", GOOD)),
    Case("held-out file absent", "does not exist", ("--eval_split={root}/x.jsonl",)),
    Case("files have no splits", "files have no splits", ("--eval_split=test",)),
    Case(
        "held-out file bad",
        "x.jsonl:1: is not JSON",
        ("--eval_split={root}/x.jsonl",),
        file("x.jsonl", b"{"),
    ),
    Case("other template than rows", "rows.jsonl:1: has fields", ("--template=alpaca",)),
    Case("template of other columns", "(want answer)", ("--template={answer}",)),
    Case("bad rows and a cache", "is not JSON", ("--token_cache={root}/kept",), line("{")),
]
