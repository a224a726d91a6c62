"""Fine-tune a large language model over a 4-bit base, sharded with FSDP2: the run on one screen.

    python train.py --model_name DIR_OR_HUB_NAME --train_type qlora

Started plainly it starts one rank per GPU; under torchrun or srun it is one of the ranks.
"""

import os
import signal
import sys

from fsdp_qlora import arch, config, errors
from fsdp_qlora.train import launch


def run(cfg: config.Config, world) -> None:
    """Train as one of the ranks.

    Args:
        cfg: the run; its output directory is there.
        world: this process among the ranks (train/world.py).
    """
    from fsdp_qlora import data
    from fsdp_qlora.model import adapters, cache, kernels, load, placement, shard, skeleton, weights
    from fsdp_qlora.results import export, report, session
    from fsdp_qlora.train import ledger, loop, optim, versions

    out_dir, is_writer = cfg.resolved_output_dir, world.rank == 0
    if is_writer:
        config.save(cfg, out_dir / "run_config.json", versions.versions(world.device))
    info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
    chosen = kernels.choose(
        cfg.attn, cfg.liger, cfg.compute_dtype, world.device, info.softcaps_attention
    )
    dataset = data.build(cfg, info, world)
    num_steps = dataset.train.num_steps

    with session.watch_memory(world.device) as peaks:
        model = skeleton.build(info, cfg.format_name, chosen)
        adapters.attach(model, arch.select_linears(info, cfg.lora_target_modules), cfg, world.size)
        packed_cache = cache.open_cache(cfg.quant_cache, info, model.layout, world)
        placed = placement.choose(model.layout, info.num_layers, cfg, packed_cache, world)
        shard.apply(model, cfg.sharding_strategy, placed, chosen.dtype, world)
        model.set_checkpointing(cfg, world.device)
        loaded = load.fill(model, weights.build(info, cfg), packed_cache, placed, cfg, world)
    params = shard.local_parameters(model)
    optimizer, schedule = optim.build(params, cfg, num_steps)
    max_norm = cfg.grad_norm if cfg.apply_gradient_clipping else None
    trained = loop.Trained(model, params, optimizer, schedule, max_norm, world)

    record = session.describe(
        cfg, info, dataset, model, chosen, packed_cache, placed, loaded, peaks
    )
    has_bar = cfg.log_to == "tqdm"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on a stop is recorded
    with ledger.Recorder(
        out_dir, world, num_steps, record, loaded.pinned_bytes, has_bar
    ) as recorder:
        recorder.say("\n".join(record["lines"]))
        look = session.Look(trained, dataset, cfg, recorder)
        look("before")
        loop.fit(trained, dataset.train, recorder)
        look("after")
        if cfg.save_model:
            export.save(model, info, cfg, dataset.tokenizer, is_writer)
    if cfg.save_model and is_writer:
        report.render(out_dir)
        print(session.farewell(cfg), flush=True)


def rank_main(cfg: config.Config) -> None:
    """Be one of the ranks; whatever goes wrong is left as one line for the supervisor."""
    # No KeyboardInterrupt while libraries are imported: some of them swallow it.
    signal.signal(signal.SIGINT, lambda *_: launch.leave(errors.SIGINT))
    try:
        from fsdp_qlora.train import world as ranks

        world = ranks.join(cfg.gpu_budget_gib, cfg.seed)
        run(launch.agree(cfg, world), world)
        ranks.leave()
    except Exception as error:
        launch.fail(error, cfg)


def main(argv: list[str]) -> int:
    """Check all that needs no torch, then be a rank or start the ranks; return the exit code."""
    try:
        cfg = config.parse(argv)
        if launch.is_rank(os.environ):
            os.environ.update(launch.rank_env(os.environ, cfg))
            rank_main(cfg)
            return errors.DONE
        info = arch.read(cfg.model_name, need_weights=cfg.weights == "load")
        arch.select_linears(info, cfg.lora_target_modules)
        return launch.supervise(cfg, argv)
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        launch.leave(errors.SIGINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
