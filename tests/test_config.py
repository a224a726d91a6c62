"""Command lines, recipes and their faults: fsdp_qlora/config.py, cli.py and errors.py."""

import dataclasses
import importlib.util
import json
import pickle
import re
import sys
from pathlib import Path

import pytest

from fsdp_qlora import __version__, cli, config
from fsdp_qlora.__main__ import main
from fsdp_qlora.config import ALIASES, TrainConfig, cfg_notes, parse
from fsdp_qlora.errors import ENVIRONMENT, INPUT, INTEGRITY, UserError, join
from tests import timing

REFERENCE_FLAGS = """
world_size train_type llama_pro_path batch_size context_length gradient_accumulation_steps
num_epochs dataset dataset_samples sharding_strategy use_gradient_checkpointing
reentrant_checkpointing use_cpu_offload use_activation_cpu_offload low_memory no_sync precision
model_name save_model output_dir lora_rank lora_alpha lora_dropout lora_target_modules verbose lr
apply_gradient_clipping grad_norm wd profile_memory optimizer lr_scheduler loading_workers log_to
master_addr master_port seed project_name name group entity n_bits profile profiling_output
with_stack with_shapes export_trace export_memory_timeline wait_steps warmup_steps active_steps
repeat profiling_frequency max_steps
"""
LINE_OF_THE_70B_GUIDE = """
--model_name meta-llama/Llama-2-70b-hf --batch_size 2 --context_length 512 --precision bf16
--train_type qlora --use_gradient_checkpointing true --use_cpu_offload true --dataset alpaca
--reentrant_checkpointing true
"""


def faults_of(*argv: str) -> str:
    """Return the text of the error that `argv` must raise."""
    with pytest.raises(UserError) as caught:
        parse(argv)
    return str(caught.value)


def test_every_flag_of_the_reference_is_accepted_with_its_default():
    """Writing a default out, in either spelling, changes nothing; names from mission.md."""
    plain = parse(["--output_dir", "o"])
    names = REFERENCE_FLAGS.split()
    assert len(names) == 54
    for name in names:
        alias = ALIASES.get(name)
        text = cli.to_text(getattr(plain, name)) if alias is None else alias.usual
        for spelling in (name, name.replace("_", "-")):
            assert parse(["--output_dir", "o", f"--{spelling}={text}"]) == plain, name


def test_values_are_read_in_every_spelling():
    """Underscores, hyphens, "=", bare booleans, aliases, negative numbers; the last one counts."""
    line = "--model-name a/b --batch_size=4 --save_model n --apply-gradient-clipping --verbose"
    line += " --learning_rate 3e-4 --max_steps -1 --lora_r=2 --lora-r 8 --master_port auto"
    cfg = parse([*line.split(), "--sample_prompt=--what?"])
    assert (cfg.model_name, cfg.batch_size, cfg.save_model) == ("a/b", 4, False)
    assert cfg.apply_gradient_clipping
    assert (cfg.lr, cfg.max_steps, cfg.lora_rank) == (3e-4, -1, 8)
    assert (cfg.sample_prompt, cfg.master_port) == ("--what?", None)


def test_the_users_own_command_line_is_accepted():
    """The line of the 70B guide, with its flags as written there."""
    cfg = parse(LINE_OF_THE_70B_GUIDE.split())
    assert (cfg.reentrant_checkpointing, cfg.use_cpu_offload, cfg.format_name) == (
        True,
        True,
        "nf4_dq",
    )


def test_all_faults_are_told_at_once():
    """Names, types, choices, ranges and combinations stand in one line."""
    text = faults_of(
        *["--batch_size", "0", "--lr", "x", "--train_type", "qlor", "--nope", "stray", "extra"],
        *["--reentrant_checkpointing", "--use_gradient_checkpointing", "false", "--seed"],
    )
    for part in (
        "--nope: no such option",
        "extra: belongs to no flag",
        "--seed: has no value",
        "--batch_size 0: must be >= 1; default is 1",
        "--lr x: must be a number",
        "--train_type qlor: no such choice; use qlora",
        "--reentrant_checkpointing true: needs --use_gradient_checkpointing true",
    ):
        assert part in text
    assert text.count(" | ") == 6 and "\n" not in text


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--init_lora pissa", "removed: it changes the base"),
        ("--lora_r 8 --lora_rank 16", "means the same"),
        ("--log_to wandb,nowhere", "no such choice"),
        ("--n_bits 2", "belongs to an HQQ base"),
        ("--quant_type int8 --double_quant true", "no block scales"),
        ("--use_activation_cpu_offload true --use_gradient_checkpointing false", "set both"),
        ("--revision v1 --model_name tests", "is no name on the hub"),
        ("--revision v1 --model_name a/b@v2", "names another one"),
        ("--warmup_steps -1", "steps, or from 0.0 to 1.0"),
        ("--batch_size 70000 --gradient_accumulation_steps 70000", "make 4900000000 rows a step"),
        ("--objective kto --reference cached --train_type full", "it is gone after step 1"),
        ("--gpu_budget_gib 0", "must be > 0; leave it out"),
        ("--train_type lora --double_quant false", "belongs to a bitsandbytes base"),
        ("--=3", "no such option"),
    ],
)
def test_refused_with_the_reason(argv: str, reason: str):
    """One fault, one line, with what to do instead; more of them in bad_input/arguments."""
    text = faults_of(*argv.split())
    assert reason in text and " | " not in text and len(text) <= 300


def test_ddp_switches_the_default_offload_off_and_says_so():
    """Only an offload the user asked for is refused with ddp."""
    cfg = parse(["--sharding_strategy", "ddp"])
    assert not cfg.use_cpu_offload
    assert cfg_notes(cfg) == ["cpu offload is off: ddp keeps the whole base on each GPU"]
    streamed = parse(["--sharding_strategy", "ddp", "--offload_impl", "stream"])
    assert streamed.use_cpu_offload and cfg_notes(streamed) == []
    assert parse([]).use_cpu_offload


def test_flags_without_effect_are_noted_once_and_only_when_set():
    """The defaults say nothing."""
    assert cfg_notes(parse([])) == []
    said: list[str] = []
    line = "--low_memory false --compile=off --with_stack --verbose no --loading_workers -1"
    cfg = parse([*line.split(), "--entity", "me", "--name=a,b"], say=said.append)
    assert [note.split()[1] for note in said] == ["--low_memory", "--with_stack"]
    assert cfg_notes(cfg) == ["--tracker_args has no effect: --log_to has no tracker that takes it"]
    assert cfg.tracker_options == {"entity": "me", "name": "a,b"}
    assert cfg_notes(parse(["--warmup_steps", "9", "--lr_scheduler=constant"])) == [
        "--warmup_steps has no effect: --lr_scheduler is constant"
    ]
    assert cfg_notes(parse(["--grad_norm=2", "--apply_gradient_clipping=false"])) == [
        "--grad_norm has no effect: --apply_gradient_clipping is false"
    ]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", ("nf4_dq", "bfloat16", "float32", "full")),
        ("--double_quant false --precision fp32", ("nf4", "float32", "float32", "full")),
        ("--quant_type fp4", ("fp4_dq", "bfloat16", "float32", "full")),
        ("--train_type custom_qlora --quant_type fp4 --double_quant 0", ("fp4",)),
        ("--train_type hqq_lora --precision bf16_autocast", ("hqq4", "bfloat16")),
        (
            "--train_type lora --use_gradient_checkpointing false",
            ("bf16", "bfloat16", "float32", "none"),
        ),
    ],
)
def test_derived_names_follow_the_flags(argv: str, expected: tuple[str, ...]):
    """Format, dtypes and checkpointing are derived in one place."""
    cfg = parse(argv.split())
    derived = (cfg.format_name, cfg.compute_dtype, cfg.master_dtype, *cfg.levels(1))
    assert derived[: len(expected)] == expected


def test_patterns_of_ranks_are_a_table_of_a_recipe(tmp_path: Path):
    path = tmp_path / "r.toml"
    path.write_text('layers_to_transform = [0, 2]\n[rank_pattern]\n"1.*v_proj" = 5\n')
    cfg = parse([f"--recipe={path}", "--model_name=dir"])
    assert cfg.layers_to_transform == "0,2" and json.loads(cfg.rank_pattern) == {"1.*v_proj": 5}
    assert config.from_record(config.to_dict(cfg)) == (cfg, ())


def test_a_revision_is_part_of_the_name_everywhere(tmp_path: Path):
    assert parse(["--model_name=a/b", "--revision=v1"]).model_name == "a/b@v1"
    cfg = parse(["--model_name=a/b@v1", "--revision=v1"])
    assert config.from_record(config.to_dict(cfg)) == (cfg, ())
    assert dataclasses.replace(cfg, seed=1).model_name == "a/b@v1"
    place = config.place(["--model_name=a/b", "--revision=v1"])
    assert place.resolved_output_dir.name.startswith("b-v1-qlora")


def test_the_last_layers_keep_most():
    """Counts that are too many are cut; without checkpointing every layer keeps everything."""
    flags = ["--selective_layers", "2", "--uncheckpointed_layers", "1"]
    levels = ("full", "full", "selective", "selective", "none")
    assert parse(flags).levels(5) == levels
    assert parse(flags).levels(2) == levels[-2:]
    assert parse([*flags, "--use_gradient_checkpointing", "false"]).levels(2) == ("none", "none")


def test_recipe_stands_below_the_command_line(tmp_path: Path):
    """Values come from the file, aliases and lists included, unless a flag says otherwise."""
    recipe = tmp_path / "mine.toml"
    lines = 'model-name = "dir"\nlearning_rate = 2e-4\nbatch_size = 4\nsave_model = false\n'
    lines += 'lora_target_modules = ["q_proj", "v_proj"]\nseed = -5\n'
    recipe.write_text("\ufeff" + lines, encoding="utf-8", newline="\r\n")  # as Windows does
    cfg = parse(["--recipe", str(recipe), "--batch_size", "8", "--seed", "7"])
    assert (cfg.model_name, cfg.lr, cfg.batch_size, cfg.save_model) == ("dir", 2e-4, 8, False)
    assert (cfg.lora_target_modules, cfg.seed) == ("q_proj,v_proj", 7)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("batch_sise = 1", "did you mean --batch_size?"),
        ("batch_size = true", "must be a whole number"),
        ("batch_size = 2.5", "must be a whole number"),
        ("save_model = 'perhaps'", "must be true or false"),
        ("lr = 2024-01-01", "must be text, number or true/false"),
        ('model_name = "a\\u0000"', "must be printable text"),
    ],
)
def test_faults_of_a_recipe_name_its_file(tmp_path: Path, content: str, reason: str):
    """The user sees which file to repair."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text(content, errors="surrogateescape")
    text = faults_of("--recipe", str(recipe))
    assert reason in text and "mine.toml" in text and "\n" not in text


def test_output_dir_is_made_of_model_type_and_time():
    """The default is safe as a directory name and fixed by `parse`."""
    cfg = parse(["--model_name", "/models/..weird name;rm/", "--train_type", "hqq_lora"])
    assert cfg.output_dir is not None
    assert cfg.output_dir.startswith("output/weird-name-rm-hqq_lora-20")
    assert cfg.resolved_output_dir == Path(cfg.output_dir)
    assert parse(["--output_dir", "x/y"]).resolved_output_dir == Path("x/y")


def test_warmup_steps_are_the_learning_rates_unless_the_profiler_is_on():
    """As in the reference, and the run says so; a share has its old name too."""
    said: list[str] = []
    for line, warmup, profile in (
        ("--warmup_steps 7", 7, False),
        ("--warmup_ratio 1", 1.0, False),
        ("--profile --warmup_steps 7", 0.05, 7),
        ("--profile --warmup_steps 7 --warmup_ratio=0", 0.0, 7),
        ("--profile false --warmup_steps 7", 7, False),
        ("--profile --lr_warmup_steps 7", 7, True),
        ("--profile 3 --warmup_steps 0.5", 0.5, 3),
    ):
        cfg = parse(line.split(), say=said.append)
        assert (cfg.warmup_steps, type(cfg.warmup_steps)) == (warmup, type(warmup)), line
        assert cfg.profile == profile, line
    assert len(said) == 2 and all("--warmup_steps 7 is the profiler's" in note for note in said)


def test_what_the_recipe_says_can_be_taken_back(tmp_path: Path):
    """By either name of an option."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text("eval_samples = 48\ncompile = false\n")
    flags = ["--recipe", str(recipe)]
    assert (parse(flags).num_held_out(60), parse(flags).eval_split) == (48, "48")
    assert parse([*flags, "--eval_samples=0"]).num_held_out(60) == 0
    assert parse([*flags, "--eval_split", "0.1"]).num_held_out(60) == 0


def test_saved_configuration_reads_back_equal(tmp_path: Path):
    """JSON holds every field, and the versions beside them."""
    cfg = parse(["--lr", "3e-4", "--sample_prompt", "é?", "--warmup_ratio=1", "--profile=1"])
    config.save(cfg, tmp_path / "config.json", {"torch": "2.13"})
    table = json.loads((tmp_path / "config.json").read_text())
    assert table["versions"] == {"torch": "2.13"}
    read, removed = config.from_record(table)
    assert (config.to_dict(read), removed) == (config.to_dict(cfg), ())
    assert type(read.warmup_steps) is float
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_record_of_an_older_version_is_read():
    """Its warmup_steps were the profiler's; names that are no more are told where they were set."""
    old = {"lr": 3e-4, "warmup_ratio": 0.25, "warmup_steps": 1, "eval_samples": 16, "recipe": "x"}
    old |= {"eval_split": None, "name": "n", "group": None, "model_name": "m", "wait_steps": 1}
    old |= {"llama_pro_path": "gone", "train_type": "qlora", "compile": False, "init_lora": "pissa"}
    old |= {"with_stack": True, "low_memory": True, "of_later": 3, "export_memory_timeline": False}
    cfg, removed = config.from_record(old)
    assert removed == ("init_lora", "with_stack", "of_later")
    assert (cfg.lr, cfg.warmup_steps, cfg.eval_split, cfg.model_name) == (3e-4, 0.25, "16", "m")
    assert cfg.tracker_options == {"name": "n"} and not cfg.profile_memory
    assert config.from_record({"eval_samples": 0, "eval_split": "0.1"})[0].eval_split == "0.1"
    with pytest.raises(UserError, match="batch_size = 0 of the stored run: must be >= 1") as caught:
        config.from_record({"batch_size": 0})
    assert caught.value.code == INTEGRITY


def test_the_constructor_refuses_what_the_command_line_refuses():
    """With all faults at once; integers stand for floats, nothing else for anything."""
    assert TrainConfig(lr=1, sharding_strategy="ddp").use_cpu_offload is False
    with pytest.raises(UserError) as caught:
        TrainConfig(batch_size="4", lr=float("nan"), fit=None, seed=True, train_type="x")  # type: ignore
    assert str(caught.value).count(" | ") == 4
    with pytest.raises(UserError, match="needs --use_gradient_checkpointing"):
        TrainConfig(reentrant_checkpointing=True, use_gradient_checkpointing=False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().lr = 1.0  # type: ignore


def test_help_shows_every_flag_with_its_default():
    """Help ends with code 0 and imports nothing heavy: under a second, error answers too."""
    code = (
        "import sys; from fsdp_qlora.config import parse\n"
        "try: parse(sys.argv[1:])\n"
        "finally: assert not {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "--nope", "--help", "all"]
    done, seconds = timing.fastest(command, config.PROJECT_DIR)
    assert seconds < 1
    assert (done.returncode, done.stderr) == (0, "")
    entries = {" ".join(part.split()) for part in done.stdout.split("\n  --")}
    for field in dataclasses.fields(TrainConfig):
        entry = next(entry for entry in entries if entry.startswith(f"{field.name} "))
        assert field.metadata["help"] in entry
        assert field.default is None or f"[{cli.to_text(field.default)}]" in entry
        names = {name for name, alias in ALIASES.items() if alias.option == field.name}
        assert names <= {*re.findall(r"\w+", entry.partition("also: ")[2])}


def ended(capsys, *argv: str) -> str:
    """What a command line prints that ends with code 0 before anything is done."""
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code in (0, None)
    return capsys.readouterr().out


def test_short_help_shows_ten_options_and_three_examples_that_work(capsys):
    text = ended(capsys, "--help")
    assert (
        re.findall(r"^  --(\w+)", text, re.MULTILINE) == list(config.MAIN)
        and len(config.MAIN) == 10
    )
    examples = re.findall(r"^  python train.py (.*)", text, re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        words = [word for word in example.split() if word != "--print_config"]
        assert parse([word.replace("output/mine", "output/other") for word in words])
    assert ended(capsys, "--version") == f"fsdp_qlora {__version__}\n"
    changes = (config.PROJECT_DIR / ".github" / "CHANGELOG.md").read_text(encoding="utf-8")
    newest, is_new = re.search(r"^## ([\d.]+)( \(not released\))?$", changes, re.MULTILINE).groups()
    assert config.own_project()["version"] == __version__
    assert __version__ == f"{newest}.0" + ".dev0" * bool(is_new)
    shown = re.findall(r"^  --(\w+)", ended(capsys, "--help=all"), re.MULTILINE)
    assert shown == [field.name for field in dataclasses.fields(TrainConfig)]


def test_the_configuration_that_is_printed_is_a_recipe_of_what_was_given(tmp_path, capsys):
    argv = [
        "--recipe=names",
        "--model=x",
        "--packing",
        "--lr",
        "1e-5",
        "--sample_prompt=a \"b\" 'ü'",
    ]
    text = ended(capsys, *argv, "--print-config", "--do_train")
    assert "# note      --do_train has no effect" in text
    path = tmp_path / "again.toml"
    path.write_text(text)
    again = ["--recipe", str(path)]
    assert config.given(again) == config.given(argv)
    assert parse(again) == parse(argv) and parse(again).packing == "on"
    assert set(re.findall(r"^(?:# )?(\w+) =", text, re.MULTILINE)) == {*config.to_dict(parse(argv))}


def test_names_of_other_trainers_mean_what_they_mean_there(tmp_path):
    """A configuration of axolotl's, and options as transformers, TRL and PEFT declare them."""
    path, notes = Path(__file__).with_name("axolotl.yaml"), list[str]()
    cfg = parse(["--recipe", str(path), "--dataset=my.jsonl"], say=notes.append)
    assert (cfg.train_type, cfg.packing, cfg.eval_split) == ("qlora", "on", "0.05")
    assert (cfg.optimizer, cfg.attn, cfg.lr) == ("paged_adamw", "flash_attention_2", 2e-4)
    assert (cfg.lora_target_modules, cfg.precision, cfg.wd) == ("q_proj,v_proj", "bf16", 0.0)
    assert [note.split()[1] for note in notes] == ["--tf32", "--logging_steps"]
    (tmp_path / "x.yml").write_text("a: b: c\n")
    assert "not a YAML file" in faults_of("--recipe", str(tmp_path / "x.yml"))
    (tmp_path / "x.yml").write_text("lr: 1e-4\nseed: 3\nlr: 2e-4\n")
    assert "a name stands there twice" in faults_of("--recipe", str(tmp_path / "x.yml"))
    known = set()  # without importing them
    for module in (
        "transformers/training_args",
        "peft/tuners/lora/config",
        "trl/trainer/sft_config",
    ):
        root = Path(importlib.util.find_spec(module.partition("/")[0]).origin).parents[1]
        known |= set(re.findall(r"^    (\w+): ", (root / f"{module}.py").read_text(), re.MULTILINE))
    typed = {"learning_rate": "1e-3", "per_device_train_batch_size": "3", "optim": "adamw_torch"}
    typed |= {"num_train_epochs": "2", "max_length": "64", "save_steps": "7", "report_to": "none"}
    typed |= {"bf16": "true", "fp16": "false", "gradient_checkpointing": "true", "packing": "false"}
    typed |= {"lora_alpha": "8", "target_modules": "k_proj", "eval_strategy": "epoch", "seed": "1"}
    assert typed.keys() <= known
    cfg = parse([f"--{name}={value}" for name, value in typed.items()])
    assert (cfg.lr, cfg.batch_size, cfg.optimizer, cfg.num_epochs) == (1e-3, 3, "adamw", 2)
    assert (cfg.context_length, cfg.save_every, cfg.log_to, cfg.packing) == (64, "7", "tqdm", "off")
    assert (cfg.lora_target_modules, cfg.eval_every) == ("k_proj", "epoch")
    assert parse(["--eval_samples=0", "--bf16=1"]).eval_split is None
    bare = ["--do_train", "--use_peft", "--stage", "dpo", "--r=8", "--precompute_ref_log_probs"]
    cfg = parse(bare, say=(told := list[str]()).append)
    assert (cfg.objective, cfg.reference, cfg.lora_rank) == ("dpo", "cached", 8)
    assert [note.split()[1] for note in told] == ["--do_train"] and parse(
        ["--bf16=auto"]
    ).lr is None
    assert parse(["--bf16", "false"], say=told.append).precision == "bf16"
    assert told[1:] == [f"note      --bf16 has no effect: {config.ALIASES['bf16'].reason}"]
    plain = parse(["--load_in_4bit=false"])  # a 16-bit base, unless it is in 8 bit
    assert (plain.train_type, plain.format_name) == ("lora", "bf16")
    plain = parse(["--load_in_4bit=false", "--load_in_8bit=true"])
    assert (plain.train_type, plain.format_name) == ("qlora", "int8")
    assert parse(["--load_in_4bit=false", "--load_in_8bit=false"]).format_name == "bf16"
    for wrong, words in (
        ("--use_dora true", "use --train_type bnb_dora"),
        ("--deepspeed z.json", "see --sharding_strategy"),
        ("--load_in_4bit true --train_type lora", "means the same"),
        ("--learning_rte 1", "did you mean --lr?"),
        ("--trust_remote_code", "leave it out: code of a model never runs"),  # bare, as they write
        ("--stage rm", "use sft, dpo"),
        ("--packing maybe", "use auto, on, off"),
    ):
        assert words in faults_of(*wrong.split())
    names = {*config.ALIASES} & {*cli.options(TrainConfig)}
    options = {alias.option for alias in config.ALIASES.values()} - {"", *cli.options(TrainConfig)}
    assert (names, options) == (set(), set())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("plan --explian", "did you mean --explain?"),
        ("data --row 2", "did you mean --rows?"),
        ("generate --model_name x --promt y", "did you mean --prompt?"),
        ("evaluate --model_name x --task y", "did you mean --tasks?"),
        ("plan --gpus foo", "no such GPU; write a name, such as 3090"),
        ("watch tests --port 70000", "give another"),
        ("cache list nothing-of-that-name", "no such entry"),
    ],
)
def test_a_command_hints_at_its_own_options(argv: str, words: str):
    with pytest.raises(UserError, match=re.escape(words)):
        main(argv.split())


def test_the_same_fault_given_many_times_is_said_once():
    text = faults_of("--nope=1", "--nope=2", *map(str, range(100)))
    assert "--nope (2 times): no such option" in text and text.count(" | ") == 1
    assert "0, 1, 2 and 97 more: belong to no flag; write --flag value" in text


def test_user_error_is_one_short_line_whatever_it_is_given():
    """Line breaks, terminal codes, surrogates and long values cannot break the line."""
    fault = UserError("a\nb\x1b[31m\udc80" + "x" * 5000, "rule", "remedy", ENVIRONMENT)
    text = str(fault)
    assert len(text) == 300 and text.startswith("a\\nb\\x1b[31m\\udc80")
    assert text.endswith("x: rule; remedy") and "..." in text and text.isprintable()
    assert "/layer-7: rule" in str(UserError("/long" * 90 + "/layer-7", "rule", "remedy"))
    assert len(str(UserError("x", "r" * 500, "m"))) == 300


def test_joined_errors_keep_the_first_code_and_survive_pickling():
    """Worker processes may raise them."""
    faults = [UserError("a", "b", "c", ENVIRONMENT), UserError("d", "e", "f")]
    copy = pickle.loads(pickle.dumps(join(faults)))
    assert (str(copy), copy.code) == ("a: b; c | d: e; f", ENVIRONMENT)
    assert join(faults[1:]).code == INPUT


def test_a_directory_keeps_the_sign_that_stands_before_a_revision(tmp_path, monkeypatch):
    """Wherever it lies; with --revision it is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model@2").mkdir(parents=True)
    for name in ("org/model@2", str(tmp_path / "org/model@2"), "/gone/model@2", "./model@2", "m@2"):
        assert config.split_name(name) == (name, "")
        with pytest.raises(UserError, match="which is no name on the hub"):
            config.parse([f"--model_name={name}", "--revision=2"])
    assert config.split_name("org/model@3") == ("org/model", "3")
    assert config.parse(["--model_name=org/other", "--revision=3"]).model_name == "org/other@3"


def test_no_argument_escapes_as_another_error():
    """Every kind of rubbish gives a configuration or a UserError."""
    rubbish = ["", "-", "--", "=", "--=", "--lr=--", "\0", "\udcff", "1e999", "٣", "none"]
    rubbish.append("9" * 5000)
    refused = 0
    for field in dataclasses.fields(TrainConfig):
        for word in rubbish:
            try:
                parse([f"--{field.name}", word])
            except UserError as fault:
                refused += 1
                assert str(fault).isprintable()
    assert refused > 250


def test_a_share_of_own_rows_is_held_out_by_default():
    cfg = parse([])
    held_out = [cfg.num_held_out(number) for number in (99, 100, 1_000, 2_000, 10**6)]
    assert held_out == [0, 5, 50, 100, 100]
    for flags in (["--dataset=dummy"], ["--train_split=0.8"], ["--eval_split=none"]):
        assert parse(flags).num_held_out(1_000) == 0
