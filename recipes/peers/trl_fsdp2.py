"""TRL + PEFT + accelerate on FSDP2: the same shape, batch and LoRA as ours; prints a line of JSON.

    python -m fsdp_qlora random --model_name llama-2-7b --out /tmp/llama-2-7b
    accelerate launch --config_file recipes/peers/accelerate_fsdp2.yaml recipes/peers/trl_fsdp2.py \
        --model /tmp/llama-2-7b --batch_size 4 --context_length 2048 --gpu_budget_gib 24

4-bit NF4 base with double quantisation, bfloat16 storage (as TRL's FSDP pages ask), LoRA r 16
on the seven projections, non-reentrant checkpointing, Liger kernels.
"""

import argparse
import json
import statistics
import time

import datasets
import peft
import tokenizers
import torch
import transformers
import trl

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class StepTimes(transformers.TrainerCallback):
    """Seconds of each optimizer step, the GPU's work included."""

    def __init__(self):
        self.seconds, self.began = [], 0.0

    def on_step_begin(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


def random_tokenizer(vocab_size):
    words = {f"w{i}": i for i in range(vocab_size)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="w0", eos_token="w2", pad_token="w0"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--context_length", type=int, default=2048)
    parser.add_argument("--max_steps", type=int, default=13)
    parser.add_argument("--gpu_budget_gib", type=float, default=24.0)
    parser.add_argument("--liger", type=int, default=1)
    args = parser.parse_args()
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.gpu_budget_gib * 2**30 / total)
    training = trl.SFTConfig(
        output_dir="/tmp/trl",
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        max_length=args.context_length,
        bf16=True,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_liger_kernel=bool(args.liger),
        optim="adamw_torch_fused",
        learning_rate=1e-5,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    config = transformers.AutoConfig.from_pretrained(args.model)
    generator = torch.Generator().manual_seed(0)
    shape = (args.max_steps * args.batch_size * 4, args.context_length)
    ids = torch.randint(3, config.vocab_size, shape, generator=generator)
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
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
    load_s = time.perf_counter() - began
    lora = peft.LoraConfig(
        r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    times = StepTimes()
    trainer = trl.SFTTrainer(
        model,
        args=training,
        train_dataset=rows,
        processing_class=random_tokenizer(config.vocab_size),
        peft_config=lora,
        callbacks=[times],
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    step_s = statistics.median(times.seconds[3:])
    has_gpu = torch.cuda.is_available()
    result = {
        "arm": f"TRL {trl.__version__} + PEFT {peft.__version__} FSDP2" + " + Liger" * args.liger,
        "step_s": step_s,
        "tokens_per_s": args.batch_size * args.context_length * trainer.args.world_size / step_s,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if has_gpu else 0,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if has_gpu else 0,
        "load_s": load_s,
        "losses": [h["loss"] for h in trainer.state.log_history if "loss" in h],
    }
    if trainer.accelerator.is_main_process:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
