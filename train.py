"""Fine-tune a large language model over a 4-bit base, sharded with FSDP2: the run on one screen.

    python train.py --model_name DIR_OR_HUB_NAME --train_type qlora

Started plainly it starts one rank per GPU; under torchrun or srun it is one of the ranks.
"""

import os
import sys
import traceback

from fsdp_qlora import arch, config, errors
from fsdp_qlora.train import launch


def run(cfg: config.Config) -> None:
    """Train as one of the ranks."""
    from fsdp_qlora import data
    from fsdp_qlora.model import adapters, cache, kernels, load, shard, skeleton, weights
    from fsdp_qlora.results import export, session
    from fsdp_qlora.train import ledger, loop, optim
    from fsdp_qlora.train import world as ranks

    world = ranks.join(cfg.gpu_budget_gib, cfg.seed)
    chosen = kernels.choose(cfg.attn, cfg.liger, cfg.compute_dtype, world.device)
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    dataset = data.build(cfg, info, world)
    num_steps = dataset.train.num_steps

    with session.watch_memory(world.device) as load_peaks:
        model = skeleton.build(info, cfg.format_name, chosen)
        adapters.attach(model, arch.select_linears(info, cfg.lora_target_modules), cfg, world.size)
        shard.apply(model, cfg.sharding_strategy, cfg.use_cpu_offload, chosen.dtype, world)
        model.set_checkpointing(cfg.checkpointing)
        packed_cache = cache.open_cache(cfg.quant_cache, info, model.layout, world)
        loaded = load.fill(model, weights.build(info, cfg), packed_cache, cfg, world)
    params = shard.local_parameters(model)
    optimizer, schedule = optim.build(params, cfg, num_steps)
    trained = loop.Trained(model, params, optimizer, schedule, cfg.grad_norm if cfg.apply_gradient_clipping else None, world)

    record = session.describe(
        cfg, info, dataset, model, chosen, packed_cache, loaded, load_peaks
    )
    with ledger.Recorder(
        cfg.resolved_output_dir, world, num_steps, record, loaded.pinned_bytes
    ) as recorder:
        recorder.say("\n".join(record["lines"]))
        look = session.Look(trained, dataset, cfg, recorder)
        look("before")
        loop.fit(trained, dataset.train, recorder)
        look("after")
        if cfg.save_model:
            export.save(model, info, cfg, dataset.tokenizer, is_writer=world.rank == 0)
            recorder.say(session.farewell(cfg))
    ranks.leave()


def rank_main(cfg: config.Config) -> int:
    """Be one of the ranks; whatever goes wrong is left as one line for the supervisor."""
    rank, code = int(os.environ["RANK"]), errors.DONE
    try:
        run(cfg)
    except errors.UserError as error:
        code, line = error.code, str(error)
    except Exception as error:
        with open(cfg.resolved_output_dir / "logs" / f"rank{rank}.log", "a") as log:
            traceback.print_exc(file=log)
        code, line = errors.classify(error, rank)
    if code != errors.DONE:
        launch.write_error(cfg.resolved_output_dir, rank, code, line)
        if not launch.is_supervised(os.environ):
            print(f"error: {line}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)  # other ranks may hold this one in a collective: leave without goodbye
    return code


def main(argv: list[str]) -> int:
    """Check all that needs no torch, then be a rank or start the ranks; return the exit code."""
    try:
        cfg = config.parse(argv)
        if launch.is_rank(os.environ):
            os.environ.update(launch.rank_env(os.environ, cfg))
            return rank_main(cfg)
        info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
        arch.select_linears(info, cfg.lora_target_modules)
        return launch.supervise(cfg, argv)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
