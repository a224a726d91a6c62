"""A model that answers: a finished run opened again, `generate`, and `evaluate` with lm-eval."""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fsdp_qlora import arch, atomic, cli, config, hardware
from fsdp_qlora.data import tokenizer as tokenizers
from fsdp_qlora.data.prompts import read_prompts
from fsdp_qlora.data.row_formats import chat_values
from fsdp_qlora.distributed import hooks, launch
from fsdp_qlora.distributed.launch import child_env, find_port, is_rank, plan_ranks, rank_env
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError, one_line_of, refuse
from fsdp_qlora.export import adapter as adapter_files
from fsdp_qlora.planning.sizes import adopt_format

POLL_S = 0.1
Rows = Sequence[Sequence[int]]  # tokens of several prompts
Asked = str | list[dict]  # what a user says, or a conversation
NAMES, SHOWN = ("base", "adapter"), ("loss", "perplexity", "accuracy", "margin")
LONGEST_TOKENS, ANSWER_TOKENS = 2048, 256  # of a task's row, if the model could read more


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen; the sampling is transformers' own."""

    num_tokens: int = cli.flag(ANSWER_TOKENS, "answer", "longest answer, in tokens", rule=">= 1")
    temperature: float = cli.flag(0.0, "answer", "0: the likeliest token", rule=">= 0")
    top_p: float = cli.flag(1.0, "answer", "draw from so much probability", rule="above 0 to 1")
    repetition_penalty: float = cli.flag(1.0, "answer", "above 1: repeat less", rule="> 0")
    stop: str = cli.flag("", "answer", 'text that ends an answer; or several: ["a", "b"]')
    seed: int = cli.flag(0, "answer", "of what is drawn", rule=">= 0")

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(self.stop), list):
                return [str(text) for text in found if text]
        return [self.stop] * bool(self.stop)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that answers.

    Attributes:
        cfg: of the run.
        info: the base.
        world: this process among the ranks.
        model: a QuantizedModel in evaluation mode, its adapter not loaded: it computes the base.
        adapter: what is loaded on top of it, or None.
        tokenizer: transformers tokenizer of the base, with the adapter's chat template.
    """

    cfg: config.TrainConfig
    info: arch.ModelInfo
    world: Any
    model: Any
    adapter: adapter_files.SavedAdapter | None

    @property
    def is_writer(self) -> bool:
        """Whether this rank speaks and writes."""
        return self.world.rank == 0

    def say(self, text: str) -> None:
        """Print, on one rank."""
        if self.is_writer:
            print(text, flush=True)

    def load_adapter(self) -> None:
        """Put the adapter on top of the base; nothing without one."""
        from fsdp_qlora.model import adapters

        if self.adapter is not None:
            pairs, folder = self.adapter.pairs, self.adapter.path
            name = adapter_files.WEIGHTS_NAME if pairs else adapter_files.LAYERS_NAME
            scales = {own: pair.scale for own, pair in (pairs | self.adapter.experts).items()}
            adapters.load(self.model, folder / name, scales)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the base, with the chat template that the adapter has."""
        made = tokenizers.load(tokenizers.directory(self.info))
        own = self.adapter and self.adapter.path / tokenizers.CHAT_FILE
        if own and own.is_file() and not isinstance(made.chat_template, dict):
            made.chat_template = own.read_text(encoding="utf-8")
        return made

    @functools.cached_property
    def chat(self) -> Any:
        """The chat template of the tokenizer, or a plain one."""
        return tokenizers.wrap(self.tokenizer, self.cfg.model_name).chat()

    def encode(self, question: Asked, is_raw: bool = False, row: dict | None = None) -> list[int]:
        """Make the tokens of a prompt, as the model was trained to see it.

        Args:
            question: what the user says, or a conversation: role and content; the system prompt of
                the run is put before one that has none, an answer at its end is left out.
            is_raw: put no chat template around the last turn, and leave the others out.
            row: it stands in; its `tools` and `chat_template_kwargs` reach the template.

        Raises:
            UserError: the chat template cannot render it, takes too long or writes too much.
        """
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
        turns = turns[:-1] if turns[-1]["role"] == "assistant" and turns[1:] else turns
        text, tokenizer = turns[-1]["content"], self.tokenizer
        is_chat = bool(tokenizer.chat_template) and not is_raw
        if is_chat:
            if (system := self.cfg.system_prompt) and turns[0]["role"] != "system":
                turns = [{"role": "system", "content": system}, *turns]
            kwargs = json.loads(self.cfg.chat_template_kwargs or "{}")
            rule = "the chat template cannot render the conversation ({})"
            with one_line_of("generate", "use --raw", rule=rule, kinds=tokenizers.Refused):
                text = self.chat.prompt(turns, **kwargs | chat_values(row or {}))
        elif tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:  # it puts it there itself
            text = text.removeprefix(tokenizer.bos_token)
        ids = list(tokenizer(text, add_special_tokens=not is_chat).input_ids)
        if note := self.info.positions_note("a prompt of", len(ids)):
            self.say(note)
        return ids

    def reply(self, rows: Rows, how: Sampling, streamer: Any = None) -> list:
        """Continue prompts; every rank must call it, all the same. See `complete`."""
        return complete(self.model, self.tokenizer, rows, how, self.world, streamer)

    def answer_all(
        self, questions: Sequence[Asked], how: Sampling, is_raw: bool = False, of: Any = ()
    ) -> list[str]:
        """Answer prompts, `batch_size` of the run at a time, those of like length together.

        Args:
            questions: see `encode`.
            how: the tokens are chosen; what is drawn depends on the batch.
            is_raw: see `encode`.
            of: the row of each.

        Returns:
            The answers alone, in the order of the prompts.
        """
        pairs, size = itertools.zip_longest(questions, of), self.cfg.batch_size
        rows = [self.encode(question, is_raw, row) for question, row in pairs]
        order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), list[str]()
        is_silent = not self.is_writer or len(rows) == 1
        with cli.Progress("answers", len(rows), "prompts", is_silent) as progress:
            for batch in (order[first : first + size] for first in range(0, len(rows), size)):
                found += self.reply([rows[i] for i in batch], how)
                progress.update(len(batch))
        texts = dict(zip(order, found, strict=True))
        return [texts[i] for i in range(len(rows))]

    def generate(
        self, prompt: str, max_tokens: int = ANSWER_TOKENS, temperature: float = 0.0, **more: Any
    ) -> str:
        """Answer a prompt, in the chat template of the model if it has one.

        Args:
            prompt: what the user says.
            max_tokens: longest answer, in tokens.
            temperature: of the draws; 0 takes the likeliest token each time.
            more: seed, top_p, repetition_penalty, stop: see Sampling.

        Returns:
            The answer alone, without special tokens.
        """
        return self.answer_all([prompt], Sampling(max_tokens, temperature, **more))[0]

    def close(self) -> None:
        """Leave the process group; the model answers no more, `train` may start ranks again."""
        from fsdp_qlora.distributed import world

        world.leave()


def config_of(
    adapter: Path | None, flags: list[str], near: Collection[str] = ()
) -> config.TrainConfig:
    """The run that made an adapter, or what is known of it.

    Args:
        adapter: directory with adapter_config.json, and run_config.json if train.py made it; None
            for a model by itself, which is computed in 16 bit, as it is stored, or, on a CPU
            without bfloat16, in 32.
        flags: of train.py; they stand above what the directory says.
        near: options of the command whose flags these are, for hints.

    Returns:
        The configuration, for one rank if the flags do not say more.

    Raises:
        UserError: the directory holds no LoRA adapter (code 2), or wrong flags.
    """
    given, known = config.parse(flags, near=near), dict[str, Any](train_type="lora")
    known = adapter_files.options(adapter_files.read(adapter)) if adapter is not None else known
    if not hardware.count_gpus(os.environ) and not hardware.own_cpu().has_bf16:
        known = {"precision": "fp32"} | known
    known |= {name: getattr(given, name) for name in config.given(flags)}
    known |= {"output_dir": str(adapter or "output"), "fit": "off"}
    known |= {"world_size": max(given.world_size, 1), "context_parallel": 1}
    return dataclasses.replace(config.parse([]), **known)


def spread(name: str, argv: list[str], cfg: config.TrainConfig) -> int:
    """Run a command on several ranks of this machine; rank 0 has the terminal.

    Args:
        name: of the command.
        argv: its arguments.
        cfg: world_size.

    Returns:
        Exit code: of the first rank that failed, whose words are printed.

    Raises:
        UserError: more ranks than GPUs.
    """
    num_ranks, port = plan_ranks(cfg), find_port(None)
    command = [sys.executable, "-m", "fsdp_qlora", name, *argv]
    ranks: list[subprocess.Popen] = []
    with tempfile.TemporaryFile("w+") as words:
        with contextlib.ExitStack() as stack:
            for rank in range(num_ranks):
                env = child_env(os.environ, rank, num_ranks, port)
                stdin, out = (subprocess.DEVNULL, words) if rank else (None, None)
                tie, streams = launch.tied_to_parent(), (stdin, out, out)
                process = subprocess.Popen(command, -1, None, *streams, preexec_fn=tie, env=env)
                stack.enter_context(process)
                stack.callback(process.kill)
                ranks.append(process)
            while None in [rank.poll() for rank in ranks] and not any(r.returncode for r in ranks):
                time.sleep(POLL_S)
        if ranks[0].returncode in (DONE, -9) and any(rank.returncode for rank in ranks):
            words.seek(0)
            print("".join(words.readlines()[-1:]), end="", file=sys.stderr)
    return next((rank.returncode for rank in ranks if rank.returncode > 0), DONE)


def open_run(adapter: Path | None, cfg: config.TrainConfig, any_base: bool = False) -> Opened:
    """Build the base of a run on this rank, without its adapter.

    Args:
        adapter: directory of the adapter; None for a bare base.
        cfg: see `config_of`.
        any_base: it may be another one than the adapter was trained on.

    Returns:
        The model.

    Raises:
        UserError: see arch.read and model.build.
    """
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    cfg = adopt_format(cfg, info.stored.whole, frozenset())
    saved = None if adapter is None else adapter_files.read(adapter)
    if saved is not None:
        adapter_files.check_open(saved, info)
        adapter_files.check_base(saved, info, any_base)
        note = adapter_files.base_note(saved, cfg.format_name)
        if note and os.environ.get("RANK", "0") == "0":
            print(note, file=sys.stderr)
    is_one = not is_rank(os.environ)
    own = child_env(os.environ, 0, 1, find_port(None)) if is_one else rank_env(os.environ, cfg)
    before = dict(os.environ)
    os.environ.update(own)
    with cli.Progress("imports libraries", is_silent=os.environ["RANK"] != "0"):
        from fsdp_qlora.distributed import world as worlds
        from fsdp_qlora.model.load import build

    try:
        world = worlds.join()
    finally:
        if is_one:  # a run that this process starts later has ranks of its own
            os.environ.clear()
            os.environ.update(before)
    worlds.configure(world, cfg.gpu_budget_gib, cfg.seed)
    return Opened(cfg, info, world, build(cfg, info, world).model.eval(), saved)


def _generator(model: Any, world: Any) -> Any:
    """The model as transformers' `generate` wants it; every rank computes with rank 0's logits.

    Were the ranks to differ in the last bit of a logit, one of them could end before the others,
    which would wait for it for ever.
    """
    from transformers import GenerationConfig, GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from fsdp_qlora.model.attention import MASKED, PLAIN

    decoder = model.decoder
    accepted = inspect.signature(decoder.forward).parameters
    is_masked = decoder._supports_sdpa  # else with sinks

    class Generator(GenerationMixin):
        """Tokens and logits are on the host, where every machine draws the same."""

        config, generation_config, device = decoder.config, GenerationConfig(), world.device
        main_input_name, _is_stateful, is_remote_code = "input_ids", False, staticmethod(bool)
        get_experts_implementation: Any = staticmethod(dict)  # experts are ours

        def forward(self, input_ids, attention_mask=None, position_ids=None, **rest):
            hooks.beat("generate", world.rank)
            padding, word = {}, "cache" if "cache" in rest else "past_key_values"  # to 5.23
            cache, own = {word: rest[word]}, decoder.config._attn_implementation
            if attention_mask is not None and not attention_mask.all():  # rows of unlike lengths
                padding = {"attention_mask": attention_mask, "position_ids": position_ids}
                padding = {name: padding[name] for name in padding if name in accepted}
                if own == PLAIN:  # transformers' own attention knows sinks and padding
                    decoder.config._attn_implementation = MASKED if is_masked else "eager"
            logits_B1V = model(input_ids, cache=cache, **padding).float().cpu()
            decoder.config._attn_implementation = own
            logits_B1V = world.from_first(logits_B1V)
            return CausalLMOutputWithPast(logits=logits_B1V, **cache)

        __call__ = forward

    return Generator()


def complete(
    model: Any, tokenizer: Any, rows: Rows, how: Sampling, world: Any, streamer: Any = None
) -> list[str]:
    """Continue prompts; every rank must call it, all the same.

    Args:
        model: a QuantizedModel, sharded or not, in evaluation mode.
        tokenizer: transformers tokenizer.
        rows: tokens of each prompt; they are one batch, padded on the left.
        how: the tokens are chosen.
        world: the ranks.
        streamer: of transformers, shows the answer as it comes, where there is one row.

    Returns:
        The continuations, without special tokens, up to a text that ends them, or the last
        position that the model knows.

    Raises:
        UserError: a prompt is longer than that.
    """
    import torch

    ends, longest = sorted(end_ids(tokenizer) - {None}), max(map(len, rows))
    pad, num_tokens, known = ends[0] if ends else 0, how.num_tokens, model.decoder.config
    if known.model_type in arch.info.POSITION_TABLES:
        num_tokens = min(num_tokens, known.max_position_embeddings - longest + 1)
    if num_tokens < 1:
        rule = f"the model knows positions of {known.max_position_embeddings} tokens"
        raise UserError(f"a prompt of {longest} tokens", rule, "ask less")

    def read(ids: list[int]) -> tuple[str, bool]:
        """The text of an answer, and whether a text ends it."""
        kept = itertools.takewhile(lambda token: token not in ends, ids)
        text = tokenizer.decode(list(kept), skip_special_tokens=True)
        first = min([text.find(stop) for stop in how.stops if stop in text], default=None)
        return text[:first], first is not None

    def is_done(ids_BT: Any, scores: Any) -> Any:
        return torch.tensor([read(ids)[1] for ids in ids_BT[:, longest:].tolist()])

    ids_BT = torch.tensor([[pad] * (longest - len(row)) + [*row] for row in rows])
    mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    settings: dict[str, Any] = {"max_new_tokens": num_tokens, "do_sample": how.temperature > 0}
    settings |= {"repetition_penalty": how.repetition_penalty, "streamer": streamer}
    settings |= {"eos_token_id": ends or None, "pad_token_id": pad}
    settings |= {"stopping_criteria": [is_done]} if how.stops else {}
    if how.temperature:
        settings |= {"temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(how.seed)
        found_BT = _generator(model, world).generate(ids_BT, attention_mask=mask_BT, **settings)
    return [read(ids)[0].rstrip("\ufffd") for ids in found_BT[:, longest:].tolist()]


def end_ids(tokenizer: Any) -> set[int]:
    """Find the tokens that end an answer: many chat models have several.

    Args:
        tokenizer: transformers tokenizer.

    Returns:
        Ids of its end of text, and of generation_config.json (else config.json) beside it.
    """
    place = Path(tokenizer.name_or_path or os.devnull)
    files = (place / name for name in ("generation_config.json", "config.json"))
    ids = next(filter(None, map(atomic.read_json, files)), {}).get("eos_token_id")
    return {tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])}


def answer(model: Any, tokenizer: Any, ids: Sequence[int], num_tokens: int, world: Any) -> str:
    """The model's greedy continuation of a prompt; every rank must call it, all the same.

    Args:
        model: a QuantizedModel; its mode is left as it was.
        tokenizer, world: see `complete`.
        ids: tokens of the prompt.
        num_tokens: longest answer, in tokens.

    Returns:
        The answer alone, without special tokens.
    """
    from fsdp_qlora.training.losses import evaluating

    with evaluating(model):
        (text,) = complete(model, tokenizer, [ids], Sampling(num_tokens), world)
    return text.strip()


@dataclasses.dataclass(frozen=True)
class OpenOptions:
    """Which model is opened."""

    adapter: str | None = cli.flag(None, "model", "directory; none: the base alone")
    any_base: bool = cli.flag(False, "model", "not the one it was trained on")


def _parse(name: str, argv: Sequence[str], cls: Any) -> tuple:
    """The options of a command, those of train.py beside them, the adapter, and the run."""
    usage, known = f"usage: python -m fsdp_qlora {name} [--option value ...]", cli.options(cls)
    aliases = {name: row for name, row in config.ANSWER_NAMES.items() if row.option in known}
    cli.show_help_if_asked(argv, cls, usage, aliases=aliases)
    own, rest = cli.split(argv, {*known, *aliases})
    values, faults = cli.Reader(cls, aliases).read(own)
    refuse(faults)
    given, adapter = config.given(rest), Path(values["adapter"]) if values.get("adapter") else None
    cfg = config_of(adapter, rest, known)
    if adapter is None and "model_name" not in given:
        raise UserError(name, "needs --adapter or --model_name", "give one of them")
    return cls(**values), given, adapter, cfg


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Sampling, OpenOptions):
    """Answers a prompt, or a file of them, with a base and its adapter or a merged model.

    On one GPU, several (--world_size 2) or a CPU; flags of train.py (--model_name, --system_prompt,
    --batch_size, --resident_layers, ...) may follow. Without a prompt it is a conversation, line by
    line.
    """

    prompt: str = cli.flag("", "prompt", "what is asked")
    chat: bool = cli.flag(False, "prompt", "converse; /help lists the commands")
    prompts: str | None = cli.flag(None, "prompt", "file: a prompt a line, or JSONL")
    out: str | None = cli.flag(None, "prompt", "file for their answers, as JSONL")
    raw: bool = cli.flag(False, "prompt", "no chat template around the prompt")


def generate(argv: list[str]) -> int:
    """Answer a prompt, converse, or answer a file of prompts: see GenerateOptions.

    Args:
        argv: arguments without the command.

    Returns:
        Exit code.

    Raises:
        UserError: see `open_run`; or a file that cannot be read, or written.
    """
    options, _, adapter, cfg = _parse("generate", argv, GenerateOptions)
    is_file, is_alone = options.prompts is not None, not (options.prompt or options.chat)
    if is_file != (options.out is not None) or not (is_alone or not is_file):
        rule = "go together, without --prompt and --chat"
        raise UserError("--prompts FILE and --out FILE", rule, "give both or none")
    asked = read_prompts(Path(options.prompts), "--prompts") if is_file else []
    out, of_out = Path(options.out or "").expanduser(), (f"--out {options.out}", "give another")
    if is_file:
        if out.exists() and out.samefile(Path(options.prompts)):
            raise UserError(of_out[0], "is the file of the prompts", of_out[1])
        with one_line_of(*of_out):
            atomic.check_file(out)
    if cfg.world_size > 1 and not is_rank(os.environ, cfg.world_size):
        return spread("generate", argv, cfg)
    opened = open_run(adapter, cfg, options.any_base)
    opened.load_adapter()
    if not asked:
        _converse(opened, options)
        return DONE
    _, questions, of = zip(*asked, strict=True)
    found = opened.answer_all(questions, options, options.raw, of)
    rows = [{**row, "answer": text} for row, text in zip(of, found, strict=True)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if opened.is_writer:
        with one_line_of(*of_out):
            print(atomic.write(out, text))
    return DONE


def _converse(opened: Opened, options: GenerateOptions) -> None:
    """Answer the one prompt, or line by line, each after those before it."""
    from transformers import TextStreamer

    turns, streamer = list[dict[str, str]](), None
    has_commands = options.chat or sys.stdin.isatty()
    if opened.is_writer and sys.stdout.isatty() and not options.stop:  # which must not be shown
        streamer = TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for line in _lines(options, opened):
        command, _, rest = line.partition(" ")
        if not (has_commands and line.startswith("/")):
            turns.append({"role": "user", "content": line})
            (text,) = opened.reply([opened.encode(turns, options.raw)], options, streamer)
            opened.say("" if streamer else text)
            turns.append({"role": "assistant", "content": text})
        elif command == "/quit":
            return
        elif command == "/reset":
            turns = [turn for turn in turns if turn["role"] == "system"]
        elif command == "/system":
            turns = [{"role": "system", "content": rest}]
        elif command == "/save" and rest and turns[1:]:
            opened.say(_save(Path(rest), turns) if opened.is_writer else "")
        else:
            opened.say(cli.TABLE["chat_help"])


def _save(path: Path, turns: list[dict[str, str]]) -> str:
    """Append a conversation to a file; what has become of it."""
    try:
        with path.expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"error: {path}: {error.strerror}; give another file"
    return f"saved     {path}"


def _lines(options: GenerateOptions, opened: Opened) -> Iterator[str]:
    """The prompt, then lines of rank 0's terminal until one is empty or it ends."""
    if options.prompt:
        yield options.prompt
        if not options.chat:
            return
    if opened.is_writer:
        print("an empty line ends the conversation", file=sys.stderr)

    def ask() -> str:
        with contextlib.suppress(EOFError):
            return input("> " if sys.stdin.isatty() else "")
        return ""

    while line := opened.world.gather_objects(ask() if opened.is_writer else "")[0]:
        yield line


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(OpenOptions):
    """Prints loss and perplexity on held-out rows, before and after the adapter.

    The rows are those of the run, or what flags of train.py (--dataset, --eval_split, ...) say;
    of preferences (--objective dpo) it prints loss, accuracy and margin.
    With --tasks those of lm-eval instead (pip install lm-eval). What is found is written beside
    the adapter, too.
    """

    tasks: str | None = cli.flag(None, "tasks", "names of lm-eval's tasks: a,comma,list")
    task_dir: str | None = cli.flag(None, "tasks", "directory with tasks of your own")
    limit: int | None = cli.flag(None, "tasks", "rows of each task [all]", rule=">= 1")


def evaluate(argv: list[str]) -> int:
    """Print what a model is worth: see EvaluateOptions.

    Args:
        argv: arguments without the command.

    Returns:
        Exit code.

    Raises:
        UserError: see `open_run`; no held-out rows, no such task, or lm-eval is not installed.
    """
    options, given, adapter, cfg = _parse("evaluate", argv, EvaluateOptions)
    if options.tasks is None:
        config.check_own_code(vars(cfg), given, adapter or Path())
    elif importlib.util.find_spec("lm_eval") is None:
        rule = "needs lm-eval, which is not installed"
        raise UserError("--tasks", rule, "pip install lm-eval", ENVIRONMENT)
    if cfg.world_size > 1 and not is_rank(os.environ, cfg.world_size):
        return spread("evaluate", argv, cfg)
    opened = open_run(adapter, cfg, options.any_base)
    found = _held_out(opened) if options.tasks is None else _score_tasks(opened, options)
    if opened.is_writer and adapter is not None:
        path = adapter / ("evaluation.json" if options.tasks is None else "tasks.json")
        with one_line_of(path, "see to its directory: the figures above are whole", ENVIRONMENT):
            print(atomic.write_json(path, found))
    return DONE


def _held_out(opened: Opened) -> dict[str, Any]:
    """Loss and perplexity, or accuracy, over all held-out rows of all ranks."""
    from fsdp_qlora import data
    from fsdp_qlora.training import evaluate

    rows = data.build(opened.cfg, opened.info, opened.world).held_out
    if not rows:
        remedy = "say --eval_split 100, 0.1 or a file"
        raise UserError(f"{opened.cfg.dataset}", "holds no rows out", remedy)
    found: dict[str, Any] = {}
    preference = evaluate.preference_of_base(opened.model, opened.cfg, rows, opened.world)
    for name in NAMES if opened.adapter else NAMES[:1]:
        found[name] = evaluate.measure(opened.model, preference, rows, opened.world)
        shown = [f"{key} {found[name][key]:.4f}" for key in SHOWN if key in found[name]]
        opened.say(f"{name:<8} {', '.join(shown)}")
        opened.load_adapter()
    num_tokens = opened.world.sum(sum(batch.num_trained_tokens for batch in rows))
    return {**found, "num_tokens": round(num_tokens)}


def _score_tasks(opened: Opened, options: EvaluateOptions) -> dict[str, Any]:
    """What lm-eval measures, by task, as it names it ("acc,none"); every rank does all the work."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks, own = (options.tasks or "").split(","), options.task_dir
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # to read all of lm-eval's own takes its time
        manager = TaskManager(include_path=own)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        remedy = "lm-eval ls tasks lists them; --task_dir DIR adds your own"
        raise UserError(f"--tasks {','.join(unknown)}", "lm-eval has no such task", remedy)
    settings: dict[str, Any] = {"limit": options.limit, "log_samples": False, "bootstrap_iters": 0}
    settings |= {"tasks": tasks, "task_manager": manager}
    found: dict[str, Any] = {}
    for name in NAMES if opened.adapter else NAMES[:1]:
        found[name] = lm_eval.simple_evaluate(model=_as_lm(opened), **settings)["results"]
        rows = [(task, *row) for task, figures in found[name].items() for row in figures.items()]
        for task, figure, value in rows:
            kind = figure.partition(",")[0]
            if isinstance(value, float) and not kind.endswith("stderr"):
                opened.say(f"{name:<8} {task} {kind} {value:.4f}")
        opened.load_adapter()
    return found


def all_logits(model: Any, ids_BT: Any) -> Any:
    """Compute a model on whole rows; every rank must call it, all the same.

    Args:
        model: a QuantizedModel in evaluation mode.
        ids_BT: int64, on the device of this rank, padded on the right.

    Returns:
        logits_BTV: what the model says after each token.
    """
    import torch

    from fsdp_qlora.model.head import Targets

    with torch.no_grad():
        positions_N = torch.arange(ids_BT.numel(), device=ids_BT.device)
        return model(ids_BT, Targets(positions_N, None)).view(*ids_BT.shape, -1)


def _as_lm(opened: Opened) -> Any:
    """The model as lm-eval wants it: a class of its own, made here so that it stays optional."""
    from lm_eval.models.huggingface import HFLM

    model, world = opened.model, opened.world
    longest = min(opened.info.config.get("max_position_embeddings", LONGEST_TOKENS), LONGEST_TOKENS)

    class Model(HFLM):
        """base + adapter."""

        def _model_call(self, inps, **kwargs):
            return all_logits(model, inps)

        def generate_until(self, requests, disable_tqdm=False):
            is_silent, found = not opened.is_writer, []
            with cli.Progress("lm-eval", len(requests), "prompts", is_silent) as progress:
                for request in requests:
                    found.append(self._continue(*request.args))
                    progress.update()
            return found

        def _continue(self, context, settings):
            ends = settings.get("until") or []
            ends = json.dumps([ends] if isinstance(ends, str) else ends)
            num_tokens = settings.get("max_gen_toks", ANSWER_TOKENS)
            temperature = settings.get("temperature") if settings.get("do_sample") else None
            ids = self.tok_encode(context)[-max(longest - num_tokens, 1) :]
            how = Sampling(num_tokens, float(temperature or 0.0), stop=ends)
            return opened.reply([ids], how)[0]

    own = SimpleNamespace(device=world.device, config=model.decoder.config)
    settings = {"batch_size": opened.cfg.batch_size, "max_length": longest, "backend": "causal"}
    return Model(own, tokenizer=opened.tokenizer, softmax_dtype="float32", **settings)
