"""TRL + PEFT + accelerate on FSDP2: the shape, batch, rows and LoRA of ours, for bench_peers.py.

    python recipes/peers/bench_peers.py --arms ours,trl_fsdp2

runs this script for you. By hand:

    python recipes/peers/random_checkpoint.py --model_name llama-2-7b --out /tmp/llama-2-7b
    accelerate launch --config_file recipes/peers/accelerate_fsdp2.yaml recipes/peers/trl_fsdp2.py \
        --model /tmp/llama-2-7b --batch_size 4 --context_length 2048 --gpu_budget_gib 24

4-bit NF4 base with double quantisation, bfloat16 storage (as TRL's FSDP pages ask), LoRA r 16
on the seven projections, non-reentrant checkpointing, constant learning rate, AdamW, no clipping.
accelerate has no FSDP on a CPU: started by torchrun there, the ranks are plain DDP.
"""

import argparse
import json
import math
import os
import re
import time

import accelerate
import datasets
import peft
import tokenizers
import torch
import transformers
import trl

from fsdp_qlora import arch, bench, config, data
from fsdp_qlora.distributed.world import World
from fsdp_qlora.model import adapters

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 2**30
HAS_GPU = torch.cuda.is_available()


def rows_of_rank(args, num_ranks, rank):
    """What one of our ranks sees, by the code of our runs: ids, [steps][batch_size][length]."""
    case = bench.Case("full_shard", args.batch_size, args.context_length)
    flags = [f"--seed={args.seed}"]
    argv = bench.train_command(args.model, flags, case, args.max_steps, num_ranks, "unused")
    cfg = config.parse([word for word in argv if word.startswith("--")])
    world = World(rank, num_ranks, rank, num_ranks, torch.device("cpu"))
    train = data.build(cfg, arch.read(args.model, need_weights=False), world).train
    steps = [train.step(step) for step in range(train.num_steps)]
    return [batch.input_ids[:, : args.context_length].tolist() for (batch,) in steps]


def dealt_in_turn(by_rank):
    """Order rows for a trainer that deals whole batches to its ranks in turn.

    accelerate gives batch i of a sequential sampler to rank i modulo the number of ranks; then
    every rank sees at every step what it sees in a run of ours.

    Source: huggingface/accelerate, src/accelerate/data_loader.py, BatchSamplerShard.
    """
    return [row for ranks in zip(*by_rank, strict=True) for batch in ranks for row in batch]


def synchronize():
    if HAS_GPU:
        torch.cuda.synchronize()


def peaks_gib():
    """Peaks of torch's allocator since the last call: (allocated, reserved)."""
    if not HAS_GPU:
        return 0.0, 0.0
    peaks = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    torch.cuda.reset_peak_memory_stats()
    return peaks


class StepTimes(transformers.TrainerCallback):
    """Seconds of each optimizer step, the GPU's work included; fetching and logging are not."""

    def __init__(self):
        self.seconds, self.began, self.has_begun = [], 0.0, False

    def on_step_begin(self, *args, **kwargs):
        synchronize()
        if not self.has_begun:  # loading and sharding end here
            peaks_gib()
        self.has_begun = True
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.began)


class Trainer(trl.SFTTrainer):
    """SFTTrainer that takes the rows in their order and remembers what it was given."""

    seen = ()

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen = (*self.seen, inputs["input_ids"].clone())  # on the device: nothing waits
        return super().training_step(model, inputs, *args, **kwargs)


def random_tokenizer(vocab_size):
    words = {f"w{i}": i for i in range(vocab_size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", eos_token="w2", pad_token="w0"
    )


def initialise(model, seed):
    """Give every A the values that ours starts from; B is zero in both."""
    num_set = 0
    for name, param in model.named_parameters():
        found = re.search(r"layers\.(\d+)\.(.+)\.lora_A\.", name)
        if found is None:
            continue
        values, bound = torch.empty(param.shape), 1 / math.sqrt(param.shape[1])
        values.uniform_(-bound, bound, generator=adapters.generator(seed, f"{found[1]}.{found[2]}"))
        with torch.no_grad():
            param.copy_(values)
        num_set += 1
    assert num_set == 7 * model.config.num_hidden_layers, f"{num_set} matrices A"


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--context_length", type=int, default=2048)
    parser.add_argument("--max_steps", type=int, default=13)
    parser.add_argument("--gpu_budget_gib", type=float, default=24.0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--liger", type=int, default=1)
    parser.add_argument("--out", help="file for the result; the terminal gets it without")
    return parser.parse_args()


def settings(args):
    return trl.SFTConfig(
        output_dir=os.path.join(os.path.dirname(args.out or "/tmp/"), "trl"),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        max_length=args.context_length,
        bf16=True,
        use_cpu=not HAS_GPU,
        dataloader_pin_memory=HAS_GPU,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=bool(args.liger),
        optim="adamw_torch_fused",
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        seed=args.seed,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )


def load(args):
    """The 4-bit model on this rank's device, and the seconds it took."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.bfloat16,
    )
    began = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=quantization, dtype=torch.bfloat16, use_cache=False
    )
    return model, time.perf_counter() - began


def main():
    args = parse()
    local_rank, num_ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if HAS_GPU:
        torch.cuda.set_device(local_rank)
        total_bytes = torch.cuda.get_device_properties(local_rank).total_memory
        fraction = min(args.gpu_budget_gib * GIB / total_bytes, 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction)
    training = settings(args)
    by_rank = [rows_of_rank(args, num_ranks, rank) for rank in range(num_ranks)]
    ids = dealt_in_turn(by_rank)
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    model, load_s = load(args)
    lora = peft.LoraConfig(
        r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    times = StepTimes()
    trainer = Trainer(
        model,
        args=training,
        train_dataset=rows,
        processing_class=random_tokenizer(model.config.vocab_size),
        peft_config=lora,
        callbacks=[times],
    )
    initialise(trainer.model, args.seed)
    trainer.train()
    mine = by_rank[trainer.accelerator.process_index]
    seen = [batch.tolist() for batch in trainer.seen]
    here = {"peaks": peaks_gib(), "has_same_rows": seen == mine}
    ranks = accelerate.utils.gather_object([here])
    result = {
        "steps_s": times.seconds,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "peak_allocated_gib": max(rank["peaks"][0] for rank in ranks),
        "peak_reserved_gib": max(rank["peaks"][1] for rank in ranks),
        "load_s": load_s,
        "has_same_rows": all(rank["has_same_rows"] for rank in ranks),
    }
    if trainer.accelerator.is_main_process and args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(result, file)
    elif trainer.accelerator.is_main_process:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
