"""What the README says can be typed, and the files it names are there."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fsdp_qlora import cli, config
from fsdp_qlora.__main__ import COMMANDS, FORMER
from fsdp_qlora.errors import UserError
from recipes import demo_data

ROOT = Path(__file__).parent.parent
MAX_LINES = 300  # with the ways of a batch and of a weight, and the Python API
TREE_SIGNS = "│├└─ \t"
OTHER_PROGRAMS = {"cd", "git", "pip", "source", "sbatch"}  # their arguments are not ours
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OUR_PATH = re.compile(r"`((?:fsdp_qlora|recipes|tests|\.ci)/[\w./-]*|train\.py|Makefile)`")


@pytest.fixture
def readme() -> str:
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("README.md is not there")
    return path.read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks, without VARIABLE=value in front."""
    blocks = [block for language, block in FENCED.findall(text) if language == "bash"]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in re.split(r"&&|;|\|", line)]
    return [words for words in map(words_of, parts) if words]


def words_of(part: str) -> list[str]:
    words = shlex.split(part.removeprefix("$ "), comments=True)
    return list(itertools.dropwhile(re.compile(r"\w+=").match, words))


def fault(words: list[str]) -> str | None:
    """What is wrong with a command; None when it can be typed as it stands."""
    program = Path(words[0]).name
    if "train.py" in words:
        return fault_of_training(words[words.index("train.py") + 1 :])
    if words[1:3] == ["-m", "fsdp_qlora"]:
        return fault_of_verb(words[3:])
    if words[1:2] == ["recipes/demo_data.py"]:
        return None if words[2] in demo_data.MAKERS else f"no data {words[2]}"
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        unknown = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"no target {unknown}" if unknown else None
    return None if program in OTHER_PROGRAMS else f"unknown program {program}"


def fault_of_training(argv: list[str]) -> str | None:
    try:
        config.parse(argv)
    except UserError as error:
        return str(error)
    except SystemExit as done:
        return None if done.code in (0, None) else f"exits with {done.code}"
    return None


TRAIN_VERBS = ("data", "plan")  # take the flags of train.py too


def fault_of_verb(argv: list[str]) -> str | None:
    if not argv or argv[0] not in {*COMMANDS, *FORMER, "--help"}:
        return f"no verb {argv[:1]}"
    command = [sys.executable, "-m", "fsdp_qlora", *argv[: 1 + (argv[0] == "export")], "--help"]
    help_text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    flags = [word.partition("=")[0] for word in argv if word.startswith("--")]
    if argv[0] in TRAIN_VERBS:
        names = [*cli.options(config.TrainConfig), *config.ALIASES, "recipe"]
        help_text += " ".join(f"--{name}" for name in names)
    unknown = [flag for flag in flags if flag not in help_text and flag != "--help"]
    return f"no options {unknown}" if unknown else None


def tree_paths(text: str) -> list[str]:
    """The paths in blocks that draw a file tree: one name a line, indented below its directory."""
    found: list[str] = []
    for _, block in FENCED.findall(text):
        is_tree = re.search(rf"^[{TREE_SIGNS}]*fsdp_qlora/(\s|$)", block, re.MULTILINE)
        parents: list[tuple[int, str]] = []
        for line in block.splitlines() if is_tree else ():
            entry = line.lstrip(TREE_SIGNS)
            indent = len(line) - len(entry)
            parents = [(depth, name) for depth, name in parents if depth < indent]
            name, *words = entry.split() or [""]
            base = "".join(parent for _, parent in parents)
            inside = base + name if name.endswith("/") else base
            files = [word for word in words if re.fullmatch(r"[\w-]+\.(py|toml|md)", word)]
            found += [base + name, *(inside + word for word in files)] if name else []
            parents += [(indent, name)] if name.endswith("/") else []
    return found


def test_every_command_can_be_typed(readme):
    found = commands(readme)
    assert ["make", "quickstart"] in found
    assert ["make", "test"] in found
    assert [(" ".join(words), fault(words)) for words in found if fault(words)] == []


def test_every_named_file_is_there(readme):
    named = [*OUR_PATH.findall(readme), *tree_paths(readme)]
    assert "fsdp_qlora/" in named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_it_is_short(readme):
    assert len(readme.splitlines()) <= MAX_LINES


def test_the_checks_find_what_is_wrong():
    text = (
        "```bash\nmake tset  # comment\n$ A=1 python train.py \\\n  --model_nam x && cd y\n"
        "python -m fsdp_qlora reprot x\npython -m fsdp_qlora report --oops x\nrm -rf x\n"
        "torchrun --nproc-per-node 2 train.py --model_name x --output_dir=y\n```\n"
        "```\ntrain.py   the run\nfsdp_qlora/\n├── config.py  all\n└── train/   steps  loop.py\n"
        "recipes/\n```\n```text\nmake nothing\n```"
    )
    faults = [fault(words) for words in commands(text)]
    assert [bool(found) for found in faults] == [True, True, False, True, True, True, False]
    assert "--model_name" in str(faults[1])
    assert tree_paths(text) == [
        "train.py",
        "fsdp_qlora/",
        "fsdp_qlora/config.py",
        "fsdp_qlora/train/",
        "fsdp_qlora/train/loop.py",
        "recipes/",
    ]
