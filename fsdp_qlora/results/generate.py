"""Answers of the sharded model, greedy or drawn, the same on every rank; the verb `generate`."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdp_qlora.errors import DONE, UserError
from fsdp_qlora.results import reopen


def pieces(
    model: Any,
    tokenizer: Any,
    prompt: str,
    num_tokens: int,
    device: Any,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the model's continuation of a prompt as it comes; every rank must take all of it.

    Args:
        model: a PackedModel, sharded or not, in evaluation mode.
        tokenizer: transformers tokenizer.
        prompt: text as the model was trained to see it.
        num_tokens: longest answer, in tokens.
        device: of this rank.
        temperature: of the draws; 0 takes the likeliest token.
        seed: of the draws.

    Yields:
        Pieces of the answer, without special tokens.
    """
    import torch
    from transformers import DynamicCache

    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
    generator = torch.Generator().manual_seed(seed)
    cache, answer_ids, shown = DynamicCache(), [], ""
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = model(ids, past_key_values=cache)[0, -1]
        if temperature:
            chances = (logits.float().cpu() / temperature).softmax(0)
            next_id = int(torch.multinomial(chances, 1, generator=generator))
        else:
            next_id = int(logits.argmax())
        if next_id == tokenizer.eos_token_id:
            break
        answer_ids.append(next_id)
        text = tokenizer.decode(answer_ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character is not whole yet
            yield text[len(shown) :]
            shown = text
        ids = torch.tensor([[next_id]], device=device)


def answer(model: Any, tokenizer: Any, prompt: str, num_tokens: int, device: Any) -> str:
    """The model's greedy continuation of a prompt; every rank must call it, all the same.

    Args:
        model: a PackedModel; its mode is left as it was.
        tokenizer, prompt, num_tokens, device: see `pieces`.

    Returns:
        The answer alone, without special tokens.
    """
    was_training = model.training
    model.eval()
    text = "".join(pieces(model, tokenizer, prompt, num_tokens, device))
    model.train(was_training)
    return text.strip()


def main(argv: list[str]) -> int:
    """The verb `generate`: one answer, or a conversation on the terminal."""
    parser = argparse.ArgumentParser(
        prog="python -m fsdp_qlora generate",
        description="Answer a prompt with a base and its adapter, on one card or a CPU; "
        "flags of train.py (--model_name, --resident_layers, ...) may follow.",
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
    opened = reopen.open_run(args.adapter, flags)
    opened.load_adapter()
    from fsdp_qlora import data

    tokenizer = data.load_tokenizer(opened.info)
    turns: list[dict[str, str]] = []
    prompts = iter(input, "") if args.prompt is None else iter([args.prompt])
    if args.prompt is None:
        print("an empty line ends the conversation", file=sys.stderr)
    for prompt in prompts:
        turns.append({"role": "user", "content": prompt})
        has_template = tokenizer.chat_template and not args.raw
        text = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            if has_template
            else prompt
        )
        said = ""
        rest = args.num_tokens, opened.world.device, args.temperature, args.seed
        for piece in pieces(opened.model, tokenizer, text, *rest):
            said += piece
            print(piece, end="", flush=True)
        print()
        turns.append({"role": "assistant", "content": said})
    return DONE
