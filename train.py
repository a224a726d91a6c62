"""Fine-tune a large language model over a 4-bit base, sharded with FSDP2: the run on one screen.

    python train.py --model_name DIR_OR_HUB_NAME --train_type qlora

Started plainly it plans the run, then starts one rank per GPU; under torchrun or srun it is one of
the ranks.
"""

import os
import signal
import sys

from fsdp_qlora import config, errors
from fsdp_qlora.plan.run import RunPlan
from fsdp_qlora.train import failure, fitting, launch


def run(plan: RunPlan, world, **dry_run) -> None:
    """Train as one of the ranks.

    Args:
        plan: the run, with what was chosen for it; its output directory is there.
        world: this process among the ranks (train/world.py).
        dry_run: further arguments of train.rehearsal.rehearse.
    """
    from fsdp_qlora import data
    from fsdp_qlora.model import shard
    from fsdp_qlora.model.build import build
    from fsdp_qlora.results import export, report, session
    from fsdp_qlora.train import ledger, loop, optim, profiler, rehearsal, rows, versions

    cfg, info, is_writer = plan.cfg, plan.info, world.rank == 0
    out_dir = cfg.resolved_output_dir
    if is_writer:
        config.save(cfg, out_dir / "run_config.json", versions.versions(world.device))
    dataset = data.build(cfg, info, world)
    num_steps = dataset.train.num_steps

    account = rows.Account(plan, world.device, session.nbytes(dataset))
    with account.phase("load"):
        built = build(cfg, info, world)
    account.hold(built.model, built.placed)
    params = shard.local_parameters(built.model)
    optimizer, schedule = optim.build(params, cfg, num_steps)
    account.watch(params, optimizer)
    max_norm = cfg.grad_norm if cfg.apply_gradient_clipping else None
    trained = loop.Trained(built.model, params, optimizer, schedule, max_norm, world)

    record = session.describe(cfg, info, dataset, built, account)
    if rehearsal.is_wanted(cfg, world.device):
        record["lines"].append(rehearsal.rehearse(trained, dataset.train, cfg, account, **dry_run))
    pinned_bytes, has_bar = built.loaded.pinned_bytes, cfg.log_to == "tqdm"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on a stop is recorded
    with (
        ledger.Recorder(
            out_dir, world, num_steps, record, pinned_bytes, has_bar, account
        ) as recorder,
        profiler.watched(cfg, world.rank, world.device, recorder.say) as after_step,
    ):
        recorder.say("\n".join(record["lines"]))
        look = session.Look(trained, dataset, cfg, recorder)
        look("before")
        loop.fit(trained, dataset.train, recorder, after_step)
        look("after")
        if cfg.save_model:
            with account.phase("save"):
                export.save(built.model, info, cfg, dataset.tokenizer, is_writer)
            recorder.collect("save")
        recorder.say("\n".join(recorder.compared()))
    if cfg.save_model and is_writer:
        report.render(out_dir)
        print(session.farewell(cfg), flush=True)


def rank_main(cfg: config.Config, given: frozenset[str]) -> None:
    """Be one of the ranks; whatever goes wrong is left as one line for the supervisor."""
    # No KeyboardInterrupt while libraries are imported: some of them swallow it.
    signal.signal(signal.SIGINT, lambda *_: failure.leave(errors.SIGINT))
    plan = None
    try:
        from fsdp_qlora.train import world as ranks

        world = ranks.join(cfg.gpu_budget_gib, cfg.seed)
        plan = fitting.agree(launch.agree(cfg, world), given, world)
        run(plan, world)
        ranks.leave()
    except Exception as error:
        failure.fail(error, cfg, plan)


def main(argv: list[str]) -> int:
    """Check all that needs no torch, then be a rank or start the ranks; return the exit code."""
    try:
        cfg, given = config.parse(argv), config.given(argv)
        if launch.is_rank(os.environ):
            os.environ.update(launch.rank_env(os.environ, cfg))
            rank_main(cfg, given)
            return errors.DONE
        return launch.supervise(cfg, argv, plan=fitting.plan(cfg, given))
    except errors.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        failure.leave(errors.SIGINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
