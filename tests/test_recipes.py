"""Every recipe is a command line that works, and has a page that says what it does."""

import dataclasses
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from fsdp_qlora import arch, config
from fsdp_qlora.__main__ import COMMANDS, completion, main
from fsdp_qlora.errors import UserError
from fsdp_qlora.planning import run as plans
from tests.test_readme import commands, fault

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))
NUM_RECIPES = 18
ON_A_LAPTOP = {"dialogues", "instructions", "names", "preferences", "text"}
WITHOUT_PAGE = {"quickstart", "reference"}  # the README and defaults.md describe them
MODELS = {"llama-3.1-8b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "gemma-3-1b"}
MODELS |= {"mistral-small", "qwen2.5-72b", "llama-3.3-70b"}  # one page has them all: gpus.md
GPUS = {"12": "12 GB", "16": "16 GB", "24": "24 GB", "2x12": "2 x 12 GB", "2x24": "2 x 24 GB"}
GPUS |= {"48": "48 GB"}
README = Path(__file__).parents[1] / "README.md"
PAGE = RECIPES[0].parent / "gpus.md"


def planned() -> list[str]:
    """Rows of the table: what each machine makes of each recipe of a model."""
    rows = [f"| recipe | {' | '.join(GPUS.values())} |", "|---" * (1 + len(GPUS)) + "|"]
    for name in sorted(MODELS | {"llama-2-7b", "llama-2-70b"}):
        words = ["--recipe", name, "--gpus", ",".join(GPUS), "--host", "64"]
        _, cfg, given, machines = plans.parse(words)
        info, cells = arch.read(cfg.model_name, need_weights=False), []
        for machine in machines.values():
            found = plans.survey(info, cfg, given, machine)
            longest = f"{found['longest']:,} tokens"
            cell = f"{found['gpu_gib']:.1f} GiB, {found['step_s']:.3g} s<br>to {longest}"
            cells.append(
                cell if found["fits"] else f"**no**{f': {longest}' * bool(found['longest'])}"
            )
        size = f"{arch.num_params(info) / 1e9:.1f}B"
        rows.append(f"| {name} ({size}) | {' | '.join(cells)} |")
    return rows


def test_the_table_of_models_and_gpus_is_what_the_plan_says():
    """Where it differs it is written anew: look at it, and commit it."""
    old, rows = PAGE.read_text(encoding="utf-8"), planned()
    start = old.index(rows[0])
    new = old[:start] + "\n".join(rows) + old[old.index("\n\n", start) :]
    PAGE.write_text(new, encoding="utf-8")
    assert old == new, f"{PAGE} was not what the plan says; it is now"
    # README has some of the rows, shorter.
    short = re.sub(
        r"[\d.]+ GiB, ([\d.]+ s)<br>to ([\d,]+) tokens", r"\2; \1", new.replace("**", "")
    )
    cells = dict(re.findall(r"(?m)^\| (\S+) \(\S+\) (\|.*)$", short))
    told = re.findall(r"(?m)^\| `(\S+)` (\|.*; [\d.]+ s \|.*)$", README.read_text(encoding="utf-8"))
    assert len(told) >= 6 and told == [(name, cells[name]) for name, _ in told]
    assert len(rows) == 13 and 0 < new.count("**no**:") < new.count("<br>") / 5


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
    assert path.stem in WITHOUT_PAGE | MODELS or path.with_suffix(".md").is_file()


def test_recipes_are_listed_shown_and_copied(tmp_path, monkeypatch, capsys):
    """A copy is read by --recipe; nothing is written over."""
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", "list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [path.stem for path in RECIPES]
    assert main(["recipe", "list", "llama-3"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["llama-3.1-8b", "llama-3.3-70b"]
    assert main(["recipe", "show", "qwen3-8b"]) == 0
    assert capsys.readouterr().out == (RECIPES[0].parent / "qwen3-8b.toml").read_text()
    assert main(["recipe", "copy", "qwen3-8b"]) == 0
    cfg = config.parse(["--recipe=qwen3-8b.toml", "--output_dir=out"])
    assert cfg == config.parse(["--recipe=qwen3-8b", "--output_dir=out"])
    for words, said in (
        (["copy", "qwen3-8b"], "File exists"),
        (["show", "qwen"], "recipes here: dialogues"),
        (["show"], "no such recipe"),
        (["copi"], "invalid choice"),
        (["list", "no-such"], "no such recipe"),
    ):
        with pytest.raises(UserError, match=said):
            main(["recipe", *words])


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


def test_a_shell_completes_commands_options_and_values():
    """bash itself, with the script that is printed for it; zsh and fish get as many words."""
    program = (
        completion("bash")
        + """
try() {
    COMP_WORDS=(fsdp-qlora "$@"); COMP_CWORD=$#; _fsdp_qlora; echo "${COMPREPLY[@]}"
}
try pl; try train --lora_r; try train --train_type hqq_l; try plan --gp; try plan --lora_ra
try recipe sh; try export mer; try bench --lora_r
"""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    found = [
        "plan",
        "--lora_rank",
        "hqq_lora hqq_llama_pro",
        "--gpus --gpu_budget_gib",
        "--lora_rank",
        "show",
    ]
    assert done.stdout.splitlines() == [*found, "merged", ""]
    assert completion("zsh").endswith(completion("bash"))
    fish = completion("fish")
    assert "from train' -l lora_rank\n" in fish and "from recipe' -a 'list show copy'" in fish
    assert all(f"from {command}'" in fish for command in COMMANDS)
    with pytest.raises(UserError, match="want one of bash"):
        main(["--completion", "csh"])


def test_rows_of_the_measured_page_are_command_lines_of_a_run(tmp_path):
    """Each parses, has rows for all its steps, and names a known shape."""
    path = README.parent / "recipes" / "measured" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure", path)
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    for name in measure.TABLE["rows"]:
        first, *flags = measure.command(name, tmp_path)
        cfg = config.parse(flags)
        assert first == "train" and cfg.world_size in (1, 2), name
        per_step = cfg.batch_size * cfg.gradient_accumulation_steps * cfg.world_size
        assert cfg.dataset_samples >= per_step * cfg.max_steps // cfg.context_parallel, name
        assert arch.read(cfg.model_name, need_weights=False).num_layers > 0, name
