"""Every recipe is a command line that works, and has a page that says what it does."""

import dataclasses
import subprocess
import tomllib
from pathlib import Path

import pytest

from fsdp_qlora import config
from tests.test_readme import commands, fault

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
NUM_RECIPES = 8
ON_A_LAPTOP = {"dialogues", "instructions", "names", "text"}
WITHOUT_PAGE = {"quickstart", "reference"}  # the README and defaults.md describe them


def test_all_recipes_are_found():
    assert len(RECIPES) == NUM_RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_by_its_path_and_by_its_name(path):
    by_path = config.parse(["--recipe", str(path), "--output_dir=out"])
    by_name = config.parse(["--recipe", path.stem, "--output_dir=out"])
    assert by_path == by_name
    for name, value in tomllib.loads(path.read_text(encoding="utf-8")).items():
        if name != "output_dir":
            assert getattr(by_path, name) in (value, str(value), None if value == "none" else value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_only_what_differs_from_the_defaults(path):
    defaults = {field.name: field.default for field in dataclasses.fields(config.TrainConfig)}
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    assert [name for name, value in values.items() if defaults[name] == value] == []
    assert not values.keys() & {"overwrite", "resume"}  # a requeued job would lose its checkpoints


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_has_a_page_beside_it(path):
    assert path.stem in WITHOUT_PAGE or path.with_suffix(".md").is_file()


def test_every_command_of_a_page_of_the_laptop_can_be_typed():
    pages = [path.with_suffix(".md") for path in RECIPES if path.stem in ON_A_LAPTOP]
    found = [words for page in pages for words in commands(page.read_text(encoding="utf-8"))]
    assert len(found) > 4 * len(pages)
    assert [(" ".join(words), fault(words)) for words in found if fault(words)] == []


def test_the_batch_script_is_shell_and_its_options_are_ours():
    path = RECIPES[0].parent / "dialogues.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    block = f"```bash\n{path.read_text(encoding='utf-8')}```\n"
    found = [words for words in commands(block) if {"train.py", "fsdp_qlora"} & set(words)]
    assert len(found) == 2 and [fault(words[words[0] == "srun" :]) for words in found] == [None] * 2
