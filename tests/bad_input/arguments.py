"""Bad command lines and recipes."""

import os

from tests.bad_input.case import Case, Place

TOKEN = "hf_" + "Canary0Token1Canary2Token3"
ADDRESS = "https://alice:geheim-canary@example.org/rows.jsonl"


def recipe(text: str):
    """Write x.toml."""

    def make(place: Place) -> None:
        (place.root / "x.toml").write_text(text, encoding="utf-8", errors="surrogateescape")

    return make


def pipe(name: str):
    """What waits for ever when it is opened."""
    return lambda place: os.mkfifo(place.root / name)


X_TOML = ("--recipe={root}/x.toml",)
CASES = [
    Case("unknown flag", "did you mean --lora_rank?", ("--lora_rnk=8",)),
    Case("unlike any flag", "--help all lists them", ("--zzzzzzzz=8",)),
    Case("one hyphen", "belongs to no flag", ("-batch_size=8",)),
    Case("word without a flag", "belongs to no flag", ("--lora_rank", "8", "qlora")),
    Case("no value", "write --lr=VALUE", ("--lr",)),
    Case("text for a number", "must be a whole number", ("--batch_size=many",)),
    Case("fraction for a whole number", "must be a whole number", ("--batch_size=1.5",)),
    Case("empty number", "must be a whole number", ("--batch_size=",)),
    Case("number of 5,000 digits", "must be a whole number", ("--batch_size=" + "9" * 5000,)),
    Case("rows below one", "must be >= 1", ("--batch_size=0",)),
    Case("accumulation below one", "must be >= 1", ("--gradient_accumulation_steps=0",)),
    Case("no epochs", "must be > 0", ("--num_epochs=0",)),
    Case("no steps", "must be -1 or >= 1", ("--max_steps=0",)),
    Case("negative rank", "must be >= 1", ("--lora_rank=-4",)),
    Case("alpha zero", "must be > 0", ("--lora_alpha=0",)),
    Case("learning rate zero", "must be > 0", ("--lr=0",)),
    Case("learning rate nan", "must be a number", ("--lr=nan",)),
    Case("learning rate infinite", "must be a number", ("--lr=1e999",)),
    Case("dropout of all", "must be from 0 to below 1", ("--lora_dropout=1",)),
    Case("warmup beyond the run", "steps, or from 0.0 to 1.0", ("--warmup_ratio=1.5",)),
    Case("negative decay", "must be >= 0", ("--wd=-0.1",)),
    Case("negative seed", "must be from 0 to 2**32 - 1", ("--seed=-1",)),
    Case("context of one token", "must be >= 2", ("--context_length=1",)),
    Case("no ranks", "must be -1 or >= 1", ("--world_size=0",)),
    Case("no such port", "must be from 0 to 65535", ("--master_port=70000",)),
    Case("unknown train type", "no such choice", ("--train_type=adalora",)),
    Case("unknown precision", "no such choice", ("--precision=int3",)),
    Case("unknown code", "use nf4, fp4", ("--quant_type=nf5",)),
    Case("unknown number of bits", "no such choice", ("--n_bits=5",)),
    Case("neither true nor false", "must be true or false", ("--save_model=perhaps",)),
    Case("no budget", "must be > 0", ("--gpu_budget_gib=0",)),
    Case("empty model name", "must be printable text", ("--model_name= ",)),
    Case("line break in a name", "must be printable text", ("--model_name=a\nb",)),
    Case("terminal codes in a name", "\\x1b[31m", ("--dataset=\x1b[31mred",)),
    Case("half a surrogate pair", "\\udcff", ("--dataset=\udcff",)),
    Case("zero byte in a path", "must be printable text", ("--output_dir=a\0b",)),
    Case("two faults at once", "--lr 0: must be > 0", ("--batch_size=0", "--lr=0")),
    Case("no such recipe", "recipes here: ", ("--recipe=quikstart",)),
    Case("recipe is a directory", "no such file", ("--recipe={root}/model",)),
    Case("recipe is no TOML", "not a TOML file", X_TOML, recipe("lr = ")),
    Case("recipe is not UTF-8", "not a TOML file", X_TOML, recipe("lr = '\udcff'")),
    Case("recipe with an unknown option", "no such option", X_TOML, recipe("lora_rnk = 8")),
    Case("recipe with a table", "must be text, number", X_TOML, recipe("[lr]\na = 1")),
    Case("recipe in a recipe", "no such option", X_TOML, recipe("recipe = 'quickstart'")),
    Case("offload with ddp", "each GPU", ("--sharding_strategy=ddp", "--use_cpu_offload")),
    Case("fp4 with hqq", "bitsandbytes base", ("--train_type=hqq_lora", "--quant_type=fp4")),
    Case("removed option", "Dynamo cannot trace", ("--compile",)),
    Case(
        "flash attention in fp32", "has no fp32", ("--attn=flash_attention_2", "--precision=fp32")
    ),
    Case("no such modules", "0 modules match c_proj", ("--lora_target_modules=q_proj,c_proj",)),
    Case("share above one", "must be between 0 and 1", ("--train_split=1.5",)),
    Case("shares above one", "more than all rows", ("--train_split=0.9", "--eval_split=0.2")),
    Case("held out twice", "means the same", ("--eval_samples=2", "--eval_split=0.1")),
    Case("all rows held out", "only 12 rows can be used", ("--eval_samples=12",)),
    Case("token as a name", "looks like a secret", (f"--name={TOKEN}",)),
    Case("password in an address", "looks like a secret", (f"--dataset={ADDRESS}",)),
    Case("token in a recipe", "looks like a secret", X_TOML, recipe(f"group = '{TOKEN}'")),
    Case(
        "value of a secret variable",
        "looks like a secret",
        ("--group=a-canary-of-40-signs",),
        env={"WANDB_API_KEY": "a-canary-of-40-signs"},
    ),
    Case("template without columns", "is no template", ("--template=alpacca",)),
    Case("template with a wrong brace", "write {column}", ("--template={prompt",)),
    Case("template a pipe", "no regular file", ("--template={root}/x.jinja",), pipe("x.jinja")),
    Case("prompts a pipe", "no regular file", ("--sample_prompts={root}/x.txt",), pipe("x.txt")),
    Case("prompts absent", "No such file", ("--sample_prompts={root}/x.txt",)),
    Case("template file absent", "No such file", ("--template={root}/x.jinja",)),
]
