"""Rows that come from the hub, or from a function of the user's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest

from fsdp_qlora.data import sources
from fsdp_qlora.data.sources import SourceOptions
from fsdp_qlora.errors import UserError

ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"q{i} é", "answer": f"a{i}"} for i in range(5)]


def read(path, **wanted):
    return [row for _, row in sources.read(sources.find(str(path), SourceOptions(**wanted)))]


def test_a_named_set_that_cannot_be_fetched_is_an_error_of_the_environment(tmp_path):
    """Run in a process of its own: the hub library reads its settings when it is imported."""
    code = (
        "from fsdp_qlora.data import sources\n"
        "from fsdp_qlora.errors import UserError\n"
        "try: list(sources.read(sources.find('alpaca', sources.SourceOptions())))\n"
        "except UserError as error: print(error.code, error)\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("3 dataset alpaca: yahma/alpaca-cleaned:train cannot be had")
    assert done.stdout.count("\n") == 1


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
from fsdp_qlora.data import sources
from fsdp_qlora.data.sources import SourceOptions
out = []
for name, wanted in [
    ("org/set:small", SourceOptions()), ("org/set:small:test", SourceOptions()),
    ("org/set::train[1:3]", SourceOptions()), ("org/set:small", SourceOptions(split="test")),
    ("alpaca_sample", SourceOptions(num_samples=3)), ("alpaca", SourceOptions(num_samples=3)),
    ("sql", SourceOptions(seed=1)), ("sql", SourceOptions(seed=2)),
    ("org/set:small:test,org/set:small", SourceOptions()),
    ("org/set:small:train", SourceOptions(split="test")),
]:
    found = sources.find(name, wanted)
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
    assert read(path, load_tokenizer=lambda: "T") == [first | {"split": "train"}]
    (row,) = read(f"{path}:get_custom_dataset", split="mine", load_tokenizer=lambda: "T")
    assert row["split"] == "mine"
    assert read(f"{path}:mine") == [{"input_ids": [3, 4]}, 7]
    assert type(read(f"{path}:mine")[0]["input_ids"]) is list
    assert sources.find(f"{path}:mine", SourceOptions())[0].fingerprint() is None


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
