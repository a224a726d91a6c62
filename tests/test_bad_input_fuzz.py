"""Tens of thousands of damaged rows, headers, configurations and command lines: only UserError."""

import json
import random
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fsdp_qlora import arch, config
from fsdp_qlora.arch import targets
from fsdp_qlora.data import prepare, tokenizer
from fsdp_qlora.errors import INPUT, INTEGRITY, UserError
from tests import small_tokenizers
from tests.bad_input.case import LINES, VOCAB_SIZE
from tests.model_files import write_model

NUM_ROWS, NUM_ARGUMENTS = 10_000, 4_000
NUM_HEADERS, NUM_CONFIGS, NUM_TOKENIZERS = 6_000, 4_000, 200
ROWS_PER_FILE = 500
MAX_PASSED = 0.6
SIGNS = [bytes([sign]) for sign in b'{}[]":,\\-0\0\r\xff']
SIGNS += [b"\\u", b"1e9", b"null", b"NaN", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"a":', b"[[[["]
SIGNS += [b"9" * 400, b"1" * 20]


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Change, insert, cut, double or exchange a few pieces."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data) + 1)
        upto = at + chance.randint(0, 12)
        how = chance.randrange(5)
        if how == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif how == 1:
            data[at:at] = chance.choice(SIGNS)
        elif how == 2:
            del data[at:upto]
        elif how == 3:
            data[at:at] = data[at:upto]
        else:
            data[at:upto] = chance.choice(SIGNS)
    return bytes(data)


def outcomes(
    number: int, content: bytes, take: Callable[[bytes], object], codes: tuple[int, ...]
) -> Counter:
    """What becomes of mutated contents: "good", or the code of one clear line."""
    chance, found = random.Random(11), Counter()
    for _ in range(number):
        try:
            take(mutated(content, chance))
            found["good"] += 1
        except UserError as error:
            assert error.code in codes and str(error).isprintable()
            assert all(len(fault) <= 300 for fault in str(error).split(" | "))
            found[error.code] += 1
    assert found.total() == number and found["good"] < MAX_PASSED * number, found
    print(dict(found))
    return found


def test_damaged_rows_are_named_by_file_and_line(tmp_path: Path):
    """10,000 of them, 500 a file, through reader, kind of row, template and tokenizer."""
    light = tokenizer.read(small_tokenizers.save(tmp_path / "model", "chatml"))
    chat = small_tokenizers.TEXTS[0]
    seeds = [*LINES, '{"input_ids": [1, 2], "labels": [-100, 2]}', '{"text": "a", "label": ["b"]}']
    seeds += [
        chat,
        '{"text": "abc \\u00e9 def"}',
        '{"instruction": "a", "input": "", "output": "b"}',
    ]
    chance, num_bad, path = random.Random(7), 0, tmp_path / "rows.jsonl"
    cfg = config.parse([f"--dataset={path}", "--token_cache=off", "--context_length=64"])
    for _ in range(NUM_ROWS // ROWS_PER_FILE):
        lines = [mutated(chance.choice(seeds).encode(), chance) for _ in range(ROWS_PER_FILE)]
        lines = [line.replace(b"\n", b" ") for line in lines]
        path.write_bytes(LINES[0].encode() + b"\n".join(lines))
        try:
            ready = prepare.prepare(cfg, light, VOCAB_SIZE)
        except UserError as error:
            assert "token id" in str(error) or "UTF-16" in str(error)
            continue
        with pytest.raises(UserError) as caught:
            ready.check()
        numbers = [int(n) for n in re.findall(rf"{path}:(\d+): ", str(caught.value))]
        assert len(numbers) == 5 == 1 + len(caught.value.others)
        assert numbers == sorted(numbers) and 2 <= numbers[0] <= numbers[-1] <= ROWS_PER_FILE + 1
        num_bad += ready.facts["num_bad"]
    assert num_bad > NUM_ROWS // 4


def test_damaged_headers_of_weights_are_refused_or_harmless(tmp_path: Path):
    """6,000 headers, their length written to fit or left as it was."""
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    content = (model / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data, path = content[8 : 8 + length], content[8 + length :], tmp_path / "x.safetensors"
    good, chance = arch.files.read_header(model / "model.safetensors"), random.Random(3)

    def read(text: bytes) -> None:
        size = len(text) if chance.random() < 0.8 else length
        path.write_bytes(struct.pack("<Q", size) + text + data[:4096])
        with path.open("r+b") as file:
            file.truncate(8 + len(text) + len(data))
        for name, ref in arch.files.read_header(path).items():
            assert isinstance(name, str) and 0 < ref.start <= ref.start + ref.nbytes
            assert ref.start + ref.nbytes <= path.stat().st_size

    found = outcomes(NUM_HEADERS, header, read, (INPUT, INTEGRITY))
    assert found[INTEGRITY] > NUM_HEADERS // 3 and len(good) > 3


def test_damaged_model_configurations_are_refused_or_harmless(tmp_path: Path):
    """4,000 times config.json, against weights that stay as they are."""
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    text = (model / "config.json").read_bytes()

    def read(changed: bytes) -> None:
        (model / "config.json").write_bytes(changed)
        targets.find_targets(arch.read(str(model), need_weights=True), config.TrainConfig())

    found = outcomes(NUM_CONFIGS, text, read, (INPUT, INTEGRITY))
    assert found[INTEGRITY] > NUM_CONFIGS // 4 and found[INPUT] > NUM_CONFIGS // 20
    shutil.rmtree(model)


def test_damaged_command_lines_are_refused_or_read():
    """4,000 of them; no value of another type comes through."""
    words = (
        "--lora_rank=8\0--lr=3e-4\0--train_type=qlora\0--dataset=a.jsonl\0--save_model\0--seed=1"
    )

    def parse(changed: bytes) -> None:
        argv = changed.decode("utf-8", "surrogateescape").split("\0")
        cfg = config.parse([word for word in argv if word not in ("-h", "--help")])
        assert type(cfg.lora_rank) is int and cfg.lora_rank >= 1
        assert cfg.lr is None or type(cfg.lr) is float

    outcomes(NUM_ARGUMENTS, words.encode(), parse, (INPUT,))


def test_damaged_tokenizers_are_refused_or_read(tmp_path: Path):
    """200 times tokenizer.json: the library behind it is not Python."""
    model = small_tokenizers.save(tmp_path / "model", "chatml")
    text = (model / "tokenizer.json").read_bytes()
    settings = json.loads((model / "tokenizer_config.json").read_text())

    def read(changed: bytes) -> None:
        (model / "tokenizer.json").write_bytes(changed)
        tokenizer.read(model).chat().whole([{"role": "user", "content": "a"}])

    assert settings["eos_token"]
    chance, refused = random.Random(1), 0
    for _ in range(NUM_TOKENIZERS):
        try:
            read(mutated(text, chance))
        except UserError as error:
            refused += 1
            assert error.code == INPUT and str(error).isprintable()
    assert refused > NUM_TOKENIZERS // 5
