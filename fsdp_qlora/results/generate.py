"""Answers of the sharded model, greedy or drawn, the same on every rank; the verb `generate`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fsdp_qlora.distributed import hooks
from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.results import reopen


def pieces(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    num_tokens: int,
    world: Any,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the model's continuation of a prompt as it comes; every rank must take all of it.

    The ranks take the token that rank 0 has chosen: were they to differ in the last bit of a
    logit, one of them could end before the others, which would wait for it for ever.

    Args:
        model: a PackedModel, sharded or not, in evaluation mode.
        tokenizer: transformers tokenizer.
        prompt_ids: tokens of the prompt as the model was trained to see it.
        num_tokens: longest answer, in tokens.
        world: the ranks.
        temperature: of the draws; 0 takes the likeliest token.
        seed: of the draws.

    Yields:
        Pieces of the answer, without special tokens.
    """
    import torch
    from transformers import DynamicCache

    ids = torch.tensor([list(prompt_ids)], device=world.device)
    generator = torch.Generator().manual_seed(seed)
    cache, answer_ids, shown = DynamicCache(), [], ""
    for _ in range(num_tokens):
        hooks.beat("generate", world.rank)
        with torch.no_grad():
            logits = model(ids, past_key_values=cache)[0, -1]
        if temperature:
            chances = (logits.float().cpu() / temperature).softmax(0)
            chosen = torch.multinomial(chances, 1, generator=generator)
        else:
            chosen = logits.argmax()
        next_id = int(world.gather([float(chosen)])[0][0])
        if next_id == tokenizer.eos_token_id:
            break
        answer_ids.append(next_id)
        text = tokenizer.decode(answer_ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character is not whole yet
            yield text[len(shown) :]
            shown = text
        ids = torch.tensor([[next_id]], device=world.device)


def answer(
    model: Any, tokenizer: Any, prompt_ids: Sequence[int], num_tokens: int, world: Any
) -> str:
    """The model's greedy continuation of a prompt; every rank must call it, all the same.

    Args:
        model: a PackedModel; its mode is left as it was.
        tokenizer, prompt_ids, num_tokens, world: see `pieces`.

    Returns:
        The answer alone, without special tokens.
    """
    was_training = model.training
    model.eval()
    text = "".join(pieces(model, tokenizer, prompt_ids, num_tokens, world))
    model.train(was_training)
    return text.strip()


def main(argv: list[str]) -> int:
    """The verb `generate`: one answer, or a conversation on the terminal."""
    parser = argparse.ArgumentParser(
        prog="python -m fsdp_qlora generate",
        description="Answer a prompt with a base and its adapter, or with a merged model, on one "
        "card, several (--world_size 2) or a CPU; flags of train.py (--model_name, "
        "--resident_layers, ...) may follow.",
    )
    parser.add_argument("--adapter", type=Path, help="directory; none: the base alone")
    parser.add_argument("--prompt", help="none: a conversation, line by line")
    parser.add_argument("--num_tokens", type=int, default=256, help="longest answer [256]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest [0]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    parser.add_argument("--raw", action="store_true", help="no chat template around the prompt")
    args, flags = parser.parse_known_args(argv)
    if args.adapter is None and "--model_name" not in " ".join(flags):
        raise UserError("generate", "needs --adapter or --model_name", "give one of them")
    cfg = reopen.config_of(args.adapter, flags)
    if reopen.is_parent(cfg):
        return reopen.spread("generate", argv, cfg)
    opened = reopen.open_run(args.adapter, cfg)
    opened.load_adapter()
    from fsdp_qlora import data

    tokenizer = data.load_tokenizer(opened.info)
    system = opened.cfg.system_prompt
    turns = [{"role": "system", "content": system}] if system else []
    for prompt in _prompts(args.prompt, opened):
        turns.append({"role": "user", "content": prompt})
        text = prompt
        if tokenizer.chat_template and not args.raw:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            text = text.removeprefix(_bos(tokenizer))
        said = ""
        rest = args.num_tokens, opened.world, args.temperature, args.seed
        for piece in pieces(opened.model, tokenizer, tokenizer(text).input_ids, *rest):
            said += piece
            _say(opened, piece)
        _say(opened, "\n")
        turns.append({"role": "assistant", "content": said})
    return DONE


def _bos(tokenizer: Any) -> str:
    """The beginning of text, where the tokenizer puts it before every text."""
    adds_bos = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    return tokenizer.bos_token if adds_bos else ""


def _prompts(only: str | None, opened: reopen.Opened) -> Iterator[str]:
    """The one prompt, or lines of rank 0's terminal until one is empty or it ends."""
    if only is not None:
        yield only
        return
    if opened.is_writer:
        print("an empty line ends the conversation", file=sys.stderr)
    while line := opened.world.gather_objects(_line() if opened.is_writer else "")[0]:
        yield line


def _line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _say(opened: reopen.Opened, text: str) -> None:
    if opened.is_writer:
        print(text, end="", flush=True)
