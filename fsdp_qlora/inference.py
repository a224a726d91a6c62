"""A model that answers: a finished run opened again, `generate`, and `evaluate` with lm-eval."""

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fsdp_qlora import arch, atomic, config
from fsdp_qlora.distributed import hooks, launch
from fsdp_qlora.distributed.launch import child_env, find_port, is_rank, plan_ranks, rank_env
from fsdp_qlora.errors import DONE, ENVIRONMENT, UserError, brief
from fsdp_qlora.export import adapter as adapter_files
from fsdp_qlora.planning.sizes import adopt_format

Draws = tuple[float, int] | tuple[()]
POLL_S = 0.1
NAMES = ("base", "adapter")
LONGEST_TOKENS = 2048  # of a row of a task, where the model could read more
ANSWER_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model that answers.

    Attributes:
        cfg: of the run.
        info: the base.
        world: this process among the ranks.
        model: a QuantizedModel in evaluation mode, its adapter not loaded: it computes the base.
        adapter: what is loaded on top of it, or None.
        tokenizer: transformers tokenizer of the base.
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

    def say(self, text: str, end: str = "\n") -> None:
        """Print, on one rank."""
        if self.is_writer:
            print(text, end=end, flush=True)

    def load_adapter(self) -> None:
        """Put the adapter on top of the base; nothing without one."""
        from fsdp_qlora.model import adapters

        if self.adapter is not None:
            device = self.world.device
            pairs, folder = self.adapter.pairs, self.adapter.path
            name = adapter_files.WEIGHTS_NAME if pairs else adapter_files.LAYERS_NAME
            scales = {name: pair.scale for name, pair in pairs.items()}
            adapters.load(self.model, folder / name, self.model.layers_prefix, device, scales)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer of the base."""
        from fsdp_qlora import data

        return data.load_tokenizer(self.info)

    def reply(
        self, turns: list[dict[str, str]], num_tokens: int, draws: Draws, is_raw: bool = False
    ) -> Iterator[str]:
        """Yield the answer to the last turn as it comes; every rank must take all of it.

        Args:
            turns: the conversation so far, role and content; the system prompt of the run is put
                before it.
            num_tokens: longest answer, in tokens.
            draws: see `pieces`.
            is_raw: put no chat template around the last turn, and leave the others out.

        Yields:
            Pieces of the answer, without special tokens.
        """
        text, tokenizer = turns[-1]["content"], self.tokenizer
        is_chat = bool(tokenizer.chat_template) and not is_raw
        if is_chat:
            system = self.cfg.system_prompt or ""
            turns = [{"role": "system", "content": system}] * bool(system) + turns
            kwargs = json.loads(self.cfg.chat_template_kwargs or "{}")
            kwargs |= {"tokenize": False, "add_generation_prompt": True}
            try:
                text = tokenizer.apply_chat_template(turns, **kwargs)
            except Exception as error:  # code of others: it may raise anything
                rule = f"the chat template cannot render the conversation ({brief(error)})"
                raise UserError("generate", rule, "use --raw") from error
        elif tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:  # it puts it there itself
            text = text.removeprefix(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not is_chat).input_ids
        return pieces(self.model, tokenizer, ids, num_tokens, self.world, draws)

    def generate(
        self, prompt: str, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Answer a prompt, in the chat template of the model if it has one.

        Args:
            prompt: what the user says.
            max_tokens: longest answer, in tokens.
            temperature: of the draws; 0 takes the likeliest token each time.
            seed: of the draws.

        Returns:
            The answer alone, without special tokens.
        """
        turns = [{"role": "user", "content": prompt}]
        return "".join(self.reply(turns, max_tokens, (temperature, seed)))

    def close(self) -> None:
        """Leave the process group; the model answers no more, `train` may start ranks again."""
        from fsdp_qlora.distributed import world

        world.leave()


def config_of(adapter: Path | None, flags: list[str]) -> config.TrainConfig:
    """The run that made an adapter, or what is known of it.

    Args:
        adapter: directory with adapter_config.json, and run_config.json if train.py made it; None
            for a model by itself, which is computed in 16 bit, as it is stored.
        flags: of train.py; they stand above what the directory says.

    Returns:
        The configuration, for one rank if the flags do not say more.

    Raises:
        UserError: the directory holds no LoRA adapter (code 2), or wrong flags.
    """
    known: dict[str, Any] = {"train_type": "lora"}
    if adapter is not None:
        known = adapter_files.options(adapter_files.read(adapter))
    given = config.parse(flags)
    known |= {name: getattr(given, name) for name in config.given(flags)}
    known |= {"output_dir": str(adapter or "output"), "fit": "off"}
    known["world_size"] = max(given.world_size, 1)
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
    cfg = adopt_format(cfg, info.stored_format, frozenset())
    saved = None if adapter is None else adapter_files.read(adapter)
    if saved is not None:
        adapter_files.check_open(saved, info)
        adapter_files.check_base(saved, info, any_base)
        note = adapter_files.base_note(saved, cfg.format_name)
        if note and os.environ.get("RANK", "0") == "0":
            print(note, file=sys.stderr)
    is_one = not is_rank(os.environ)
    own = child_env(os.environ, 0, 1, find_port(None)) if is_one else rank_env(os.environ, cfg)
    os.environ.update(own)
    from fsdp_qlora.distributed import world as worlds
    from fsdp_qlora.model.load import build

    world = worlds.join()
    worlds.configure(world, cfg.gpu_budget_gib, cfg.seed)
    model = build(cfg, info, world).model.eval()
    return Opened(cfg, info, world, model, saved)


def pieces(
    model: Any, tokenizer: Any, ids: Sequence[int], num_tokens: int, world: Any, draws: Draws = ()
) -> Iterator[str]:
    """Yield the model's continuation of a prompt as it comes; every rank must take all of it.

    The ranks take the token that rank 0 has chosen: were they to differ in the last bit of a
    logit, one of them could end before the others, which would wait for it for ever.

    Args:
        model: a QuantizedModel, sharded or not, in evaluation mode.
        tokenizer: transformers tokenizer.
        ids: tokens of the prompt as the model was trained to see it.
        num_tokens: longest answer, in tokens.
        world: the ranks.
        draws: temperature, and seed, of a drawn token; () takes the likeliest, as temperature 0.

    Yields:
        Pieces of the answer, without special tokens.
    """
    import torch
    from transformers import DynamicCache

    temperature, seed = draws or (0.0, 0)
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.tensor([list(ids)], device=world.device)
    cache, answer_ids, shown, ends = DynamicCache(), [], "", end_ids(tokenizer)
    for _ in range(num_tokens):
        hooks.beat("generate", world.rank)
        with torch.no_grad():
            logits_V = model(ids_BT, past_key_values=cache)[0, -1]
        own_id = int(logits_V.argmax())
        if temperature:
            chances_V = (logits_V.float().cpu() / temperature).softmax(0)
            own_id = int(torch.multinomial(chances_V, 1, generator=generator))
        next_id = int(world.gather([float(own_id)])[0][0])
        if next_id in ends:
            break
        answer_ids.append(next_id)
        text = tokenizer.decode(answer_ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character is not whole yet
            yield text[len(shown) :]
            shown = text
        ids_BT = torch.tensor([[next_id]], device=world.device)


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
        tokenizer, ids, num_tokens, world: see `pieces`.

    Returns:
        The answer alone, without special tokens.
    """
    was_training = model.training
    model.eval()
    text = "".join(pieces(model, tokenizer, ids, num_tokens, world))
    model.train(was_training)
    return text.strip()


def _parse(
    command: Callable, argv: list[str], **options: dict[str, Any]
) -> tuple[argparse.Namespace, config.TrainConfig]:
    """The arguments of a command, `given` those of train.py among them, and the run they name."""
    name = command.__name__
    parser = argparse.ArgumentParser(f"python -m fsdp_qlora {name}", description=command.__doc__)
    parser.add_argument("--adapter", type=Path, help="directory; none: the base alone")
    words = "not the one it was trained on"
    parser.add_argument("--any_base", choices=("true", "false"), help=words)
    for option, settings in options.items():
        parser.add_argument(f"--{option}", **settings)
    args, flags = parser.parse_known_args(argv)
    args.given = config.given(flags)
    if args.adapter is None and "model_name" not in args.given:
        raise UserError(name, "needs --adapter or --model_name", "give one of them")
    return args, config_of(args.adapter, flags)


def generate(argv: list[str]) -> int:
    """Answer a prompt with a base and its adapter, or with a merged model.

    On one GPU, several (--world_size 2) or a CPU; flags of train.py (--model_name,
    --resident_layers, ...) may follow.
    """
    args, cfg = _parse(
        *(generate, argv),
        prompt={"help": "none: a conversation, line by line"},
        num_tokens={"type": int, "default": 256, "help": "longest answer [256]"},
        temperature={"type": float, "default": 0.0, "help": "0: the likeliest [0]"},
        seed={"type": int, "default": 0, "help": "of the draws [0]"},
        raw={"action": "store_true", "help": "no chat template around the prompt"},
    )
    if cfg.world_size > 1 and not is_rank(os.environ, cfg.world_size):
        return spread("generate", argv, cfg)
    opened = open_run(args.adapter, cfg, args.any_base == "true")
    opened.load_adapter()
    turns: list[dict[str, str]] = []
    for prompt in _prompts(args.prompt, opened):
        turns.append({"role": "user", "content": prompt})
        reply, draws = "", (args.temperature, args.seed)
        for piece in opened.reply(turns, args.num_tokens, draws, args.raw):
            reply += piece
            opened.say(piece, end="")
        opened.say("")
        turns.append({"role": "assistant", "content": reply})
    return DONE


def _prompts(only: str | None, opened: Opened) -> Iterator[str]:
    """The one prompt, or lines of rank 0's terminal until one is empty or it ends."""
    if only is not None:
        yield only
        return
    if opened.is_writer:
        print("an empty line ends the conversation", file=sys.stderr)

    def ask() -> str:
        with contextlib.suppress(EOFError):
            return input("> " if sys.stdin.isatty() else "")
        return ""

    while line := opened.world.gather_objects(ask() if opened.is_writer else "")[0]:
        yield line


def evaluate(argv: list[str]) -> int:
    """Print loss and perplexity on held-out rows, before and after the adapter.

    The rows are those of the run, or what flags of train.py (--dataset, --eval_split, ...) say.
    With --tasks those of lm-eval instead (pip install lm-eval). What is found is written beside
    the adapter, too.
    """
    args, cfg = _parse(
        *(evaluate, argv),
        tasks={"help": "names of lm-eval's tasks: a,comma,list"},
        task_dir={"type": Path, "help": "directory with tasks of your own"},
        limit={"type": int, "help": "rows of each task [all]"},
    )
    if args.tasks is None:
        config.check_own_code(vars(cfg), args.given, args.adapter or Path())
    elif importlib.util.find_spec("lm_eval") is None:
        rule = "needs lm-eval, which is not installed"
        raise UserError("--tasks", rule, "pip install lm-eval", ENVIRONMENT)
    if cfg.world_size > 1 and not is_rank(os.environ, cfg.world_size):
        return spread("evaluate", argv, cfg)
    opened = open_run(args.adapter, cfg, args.any_base == "true")
    found = _held_out(opened) if args.tasks is None else _score_tasks(opened, args)
    if opened.is_writer and args.adapter is not None:
        path = args.adapter / ("evaluation.json" if args.tasks is None else "tasks.json")
        atomic.write_json(path, found)
        print(path)
    return DONE


def _held_out(opened: Opened) -> dict[str, Any]:
    """Loss and perplexity over all held-out rows of all ranks."""
    from fsdp_qlora import data
    from fsdp_qlora.training import loop
    from fsdp_qlora.training.evaluate import perplexity

    rows = data.build(opened.cfg, opened.info, opened.world).held_out
    if not rows:
        remedy = "say --eval_split 100, 0.1 or a file"
        raise UserError(f"{opened.cfg.dataset}", "holds no rows out", remedy)
    found: dict[str, Any] = {}
    for name in NAMES if opened.adapter else NAMES[:1]:
        loss = loop.evaluate(opened.model, rows, opened.world)
        found[name] = {"loss": loss, "perplexity": perplexity(loss)}
        opened.say(f"{name:<8} loss {loss:.4f}, perplexity {perplexity(loss):.3f}")
        opened.load_adapter()
    num_tokens = opened.world.sum(sum(batch.num_trained_tokens for batch in rows))
    return {**found, "num_tokens": round(num_tokens)}


def _score_tasks(opened: Opened, args: argparse.Namespace) -> dict[str, Any]:
    """What lm-eval measures, by task, as it names it ("acc,none"); every rank does all the work."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks, own = args.tasks.split(","), str(args.task_dir) if args.task_dir else None
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # to read all of lm-eval's own takes its time
        manager = TaskManager(include_path=own)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        remedy = "lm-eval ls tasks lists them; --task_dir DIR adds your own"
        raise UserError(f"--tasks {','.join(unknown)}", "lm-eval has no such task", remedy)
    settings = {"limit": args.limit, "log_samples": False, "bootstrap_iters": 0}
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

    model, world, tokenizer = opened.model, opened.world, opened.tokenizer
    longest = min(opened.info.config.get("max_position_embeddings", LONGEST_TOKENS), LONGEST_TOKENS)

    class Model(HFLM):
        """base + adapter."""

        def _model_call(self, inps, **kwargs):
            return all_logits(model, inps)

        def generate_until(self, requests, disable_tqdm=False):
            return [self._continue(*request.args) for request in requests]

        def _continue(self, context, settings):
            ends = settings.get("until") or []
            ends = [ends] if isinstance(ends, str) else ends
            num_tokens = settings.get("max_gen_toks", ANSWER_TOKENS)
            temperature = settings.get("temperature") if settings.get("do_sample") else None
            ids, text = self.tok_encode(context)[-max(longest - num_tokens, 1) :], ""
            draws = float(temperature or 0.0), 0
            for piece in pieces(model, tokenizer, ids, num_tokens, world, draws):
                text += piece
                if any(end in text for end in ends):
                    break
            return text[: min([text.find(end) for end in ends if end in text] + [len(text)])]

    own = SimpleNamespace(device=world.device, config=model.decoder.config)
    settings = {"batch_size": opened.cfg.batch_size, "max_length": longest, "backend": "causal"}
    return Model(own, tokenizer=tokenizer, softmax_dtype="float32", **settings)
