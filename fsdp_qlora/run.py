"""The run on one screen: parse, plan, launch; or, as one of the ranks, build, train and save.

Started plainly it plans the run, then starts one rank per GPU; under torchrun or srun it is one of
the ranks.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fsdp_qlora import checkpoint_store, cli, config, errors
from fsdp_qlora.distributed import exit_report, hooks, launch
from fsdp_qlora.distributed.launch import Poll
from fsdp_qlora.export import adapter, hub, serving
from fsdp_qlora.planning import run as plans
from fsdp_qlora.training import preflight


def run(plan: plans.RunPlan, world, given: frozenset[str], saved=None, poll: Poll = int) -> None:
    """Train as one of the ranks.

    Args:
        plan: the run, with what was chosen for it; its output directory is there.
        world: this process among the ranks, a distributed.world.World.
        given: names of the options that the user wrote.
        saved: the checkpoint that is resumed, as rank 0 has read it; None: the run starts anew.
        poll: called after each step.
    """
    with cli.Progress("imports libraries", is_silent=world.rank > 0):
        from fsdp_qlora import data
        from fsdp_qlora.training import checkpoint, evaluate, loop, memory_probe, metrics

    stored = saved and saved.state["config"].get("chat_template_kwargs")
    kwargs = world.first(lambda: data.prepare.dated(plan.cfg, plan.info.path, stored))
    plan = dataclasses.replace(plan, cfg=dataclasses.replace(plan.cfg, chat_template_kwargs=kwargs))
    cfg, is_writer, out_dir = plan.cfg, world.rank == 0, plan.cfg.resolved_output_dir
    dataset = world.each(lambda: data.build(cfg, plan.info, world))
    resumed = checkpoint.load(plan, given, saved, dataset, world)
    trained, tracker, record = _build(plan, dataset, world, saved is None)
    checkpoint.restore(trained, resumed.saved)
    base = functools.partial(plan.info.digest, 1)
    trained = evaluate.with_reference(trained, dataset, cfg, resumed.saved, base)
    kept, signals = resumed.record(out_dir, is_writer), hooks.StopFlag()
    signals.install()  # from here on a stop is recorded

    with (
        metrics.Recorder(tracker, world, dataset.train.num_steps, record, kept) as recorder,
        memory_probe.profile(cfg, world.rank, world.device, recorder.say) as after_step,
        metrics.attach_trackers(cfg, is_writer),
    ):
        recorder.say("\n".join([*record["lines"], *resumed.lines]))
        checkpointer = checkpoint.Checkpointer(trained, recorder, resumed, signals)
        evaluator = _evaluator(trained, dataset, plan, recorder, resumed.step)

        def follow() -> None:
            after_step()
            poll()
            evaluator.after_step()
            checkpointer.mark_best(evaluator.best)

        evaluator.begin()
        loop.fit(trained, dataset.train, recorder, checkpointer, follow)
        lines = evaluator.end()
        checkpointer.mark_best(evaluator.best)
        checkpointer.wait()
        if cfg.save_model:
            hooks.reach("export", world.rank)
            with tracker.phase("save"), cli.Progress("saves", is_silent=not is_writer):
                evaluator.save(cfg)
            recorder.collect("save")
            files = sorted(out_dir.glob("*.safetensors")) if is_writer else ()
            record["result"] = {file.name: checkpoint_store.listing(file) for file in files}
        recorder.say("\n".join([*lines, *recorder.compared()]))  # what is saved comes first
    if cfg.save_model and is_writer:
        _report(out_dir)
        metrics.print_summary(cfg, serving.next_steps(out_dir, cfg))
    world.barrier()  # what rank 0 writes is there for all


def _report(out_dir: Path) -> None:
    """Write the page of a finished run; what goes wrong with it does not make the run a failure."""
    from fsdp_qlora.report import page

    try:
        page.write([out_dir], out_dir)
    except Exception as error:
        remedy = f"the result is whole; python -m fsdp_qlora report {out_dir} tries again"
        print(f"warning   no report.html ({errors.printable(str(error))}): {remedy}", flush=True)


def _watch(cfg: config.TrainConfig, is_silent: bool = False) -> None:
    """With --watch: serve the live page, from a thread that ends with this process."""
    if cfg.watch and not is_silent:
        from fsdp_qlora.report.watch import Server

        server = Server([cfg.resolved_output_dir], None).begin()
        print(f"watch     {server.url} (python -m fsdp_qlora watch --help tells more)", flush=True)


def _build(plan: plans.RunPlan, dataset, world, is_new: bool) -> tuple[Any, Any, dict[str, Any]]:
    """What is trained, its memory by row, the facts of the run."""
    from fsdp_qlora.model.adapters import load, peft_note
    from fsdp_qlora.model.load import build
    from fsdp_qlora.training import losses, memory, memory_probe, metrics, optim

    cfg, info, is_probed = plan.cfg, plan.info, memory_probe.is_wanted(plan.cfg, world.device)
    if not is_probed:  # a probe would take as many tokens as the data can bring
        plan = plan.for_rows(dataset.train.most_tokens)
    tracker = memory.MemoryTracker(plan, world.device, dataset)
    with tracker.phase("load"):
        built = build(cfg, info, world)
        if cfg.init_adapter is not None and is_new:
            load(built.model, adapter.locate(cfg.init_adapter) / adapter.WEIGHTS_NAME)
    tracker.record_model(built)
    packing = losses.keep_rows_apart(built.model, dataset.train, info, world)
    trained = optim.prepare(built.model, cfg, dataset.train.num_steps, world)
    tracker.record_optimizer(trained)
    record = metrics.describe(dataset, built, tracker)
    visits = f"note      no --accumulate_by_layer: {info.model_type} layers share tensors"
    notes = [visits * (trained.per_visit < cfg.per_visit), packing, peft_note(built.model, info)]
    longest = info.positions_note("rows of up to", dataset.train.longest)
    notes += [info.rope_note(cfg.context_length), longest]
    notes += [info.recurrent_note()] * (world.device.type == "cuda")
    record["lines"] += [line for line in notes if line]
    if is_probed:
        with cli.Progress("dry run", is_silent=world.rank > 0):
            record["lines"].append(memory_probe.run(trained, dataset.train, tracker))
    return trained, tracker, record


def _evaluator(trained, dataset, plan: plans.RunPlan, recorder, num_done: int) -> Any:
    """What measures a run: it answers prompts and saves the best adapter."""
    from fsdp_qlora import inference
    from fsdp_qlora.export.model_files import save
    from fsdp_qlora.training.evaluate import Evaluator

    model, world, tokenizer = trained.model, trained.world, dataset.tokenizer

    def answer(prompt) -> str:
        return inference.answer(model, tokenizer, prompt.ids, plan.cfg.sample_tokens, world)

    own = {"tokenizer": tokenizer, "is_writer": world.rank == 0}
    save_as = functools.partial(save, model, plan.info, **own)
    return Evaluator(trained, dataset, plan.cfg, answer, save_as, recorder, num_done)


def join_and_run(argv: list[str], poll: Poll = int, is_alone: bool = False) -> config.TrainConfig:
    """Be one of the ranks, of a process group that is there or of a new one.

    Args:
        argv: the command line, the same on every rank but for what is of its host.
        poll: called after each step.
        is_alone: this process is the rank's alone: what goes wrong ends it, with one line.

    Returns:
        The configuration that was gone by.
    """
    with cli.Progress("imports torch", is_silent=os.environ.get("RANK", "0") != "0"):
        from fsdp_qlora.distributed import world as worlds
    cfg, plan, place, peers = config.place(argv), None, None, None
    try:
        known = worlds.of_process_group()
        if known is None:
            os.environ.update(launch.rank_env(os.environ, cfg))
            place = worlds.meet()
            peers = launch.watch_peers(cfg, place) if is_alone else None
        world = worlds.find_neighbors(known or worlds.join(place))
        own_dir = cfg.output_dir if "output_dir" in config.given(argv) else None
        argv, saved = _choose_start(argv, world)
        is_silent = hooks.is_supervised() or world.rank > 0
        cfg, given = config.parse(argv, say=str if is_silent else print), config.given(argv)
        _say_idle(frozenset() if is_silent else given, cfg, is_alone)
        worlds.configure(world, cfg.gpu_budget_gib, cfg.seed, cfg.deterministic)
        begun = adapter.init_facts(None if saved else cfg.init_adapter)
        world.agree(preflight.facts(cfg, world.device) | begun)
        world.first(lambda: hub.check(cfg.push_to_hub))
        may_end = saved is not None and not hooks.is_supervised()
        if may_end and world.first(lambda: _is_done(saved, cfg, False, print)):
            if peers is not None:
                peers.stop()
            return cfg
        cfg = launch.agree_output_dir(cfg, world)
        _watch(cfg, is_silent)
        if world.local_rank == 0 and own_dir not in (None, cfg.output_dir):
            print(f"note      rank 0 writes to {cfg.output_dir}; --output_dir {own_dir} is unused")
        if peers is not None:
            peers.follow(cfg.hang_timeout, cfg.resolved_output_dir)
        plan = launch.broadcast_plan(cfg, given, world)
        world = worlds.split(world, cfg.context_parallel)
        if saved is None and not hooks.is_supervised():
            adapter.check_init(plan.cfg, plan.info, str if is_silent else print)
        with preflight.explain_disk_full(plan.cfg):
            run(plan, world, given, saved, poll)
        if peers is not None:
            peers.stop()
        if known is None:
            worlds.leave()
        hooks.beat(hooks.DONE, world.rank)
        if not is_silent:
            hub.push(plan.cfg.resolved_output_dir, plan.cfg.push_to_hub)
    except Exception as error:
        cause = worlds.explain(error, place, peers)
        if is_alone:
            exit_report.fail(cause, cfg, plan)
        raise cause from error
    return plan.cfg


def _say_idle(given: frozenset[str], cfg: config.TrainConfig, is_alone: bool) -> None:
    has_port = os.environ.get("MASTER_PORT") == str(cfg.master_port)
    idle = {"max_restarts", *["master_port"][has_port:], *["hang_timeout"][is_alone:]}
    if what := ", --".join(sorted(idle & given)):
        print(f"note      --{what}: without effect, what has started the ranks decides", flush=True)


def _choose_start(argv: list[str], world) -> tuple[list[str], Any]:
    """What --resume and --init_adapter stand for; rank 0 chooses the checkpoint for all hosts."""
    if hooks.is_supervised():
        return argv, preflight.saved_of(config.parse(argv))
    place, cfg = world.meeting, config.place(argv)
    if place is not None and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        own_dir = cfg.output_dir if "output_dir" in config.given(argv) else ""
        before = place.read("output_dir") or own_dir
        argv = [*argv, *([f"--output_dir={before}", "--resume=auto"] if before else [])]
    argv, saved = preflight.expand_resume(argv, functools.partial(print, flush=True), world.first)
    return argv if saved is not None else adapter.expand_init(argv), saved


def _is_done(saved, cfg: config.TrainConfig, is_silent: bool, say: Callable[[str], Any]) -> bool:
    """Whether a run is over and its result whole; makes up for what a kill has prevented."""
    if not preflight.is_done(saved, cfg):
        return False
    place = saved.run_dir
    if cfg.save_model and (fault := adapter.fault(place, cfg)):
        say(f"resume    {fault}: the result is made again from step {saved.step}")
        return False
    if cfg.save_model and not is_silent and not (place / checkpoint_store.REPORTS[0]).exists():
        _report(place)
    say(f"already done: {place} holds the result of all {saved.step} steps")
    if not is_silent:
        hub.check(cfg.push_to_hub)
        hub.push(place, cfg.push_to_hub)
    return True


def launch_ranks(argv: list[str], **followed: Any) -> int:
    """Check all that needs no torch, then be a rank or start the ranks.

    Args:
        argv: the command line.
        followed: start, tell and poll of distributed.launch.Attempt.

    Returns:
        Exit code of the command.

    Raises:
        UserError: what was checked is not as it must be.
    """
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    is_silent = hooks.is_supervised() or number != "0"
    say: Callable[[str], Any] = str if is_silent else functools.partial(print, flush=True)
    argv = preflight.spell_out(argv)
    cfg = config.place(argv)
    if launch.is_rank(os.environ, cfg.world_size):
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun may be killed, too
            launch.tied_to_parent(os.getppid())()
        # No KeyboardInterrupt while libraries are imported: some of them swallow it.
        signal.signal(signal.SIGINT, lambda *_: exit_report.leave(errors.SIGINT))
        os.environ.update(launch.rank_env(os.environ, cfg))
        size, asked = os.environ["WORLD_SIZE"], str(cfg.world_size)
        if size == "1" or asked not in ("-1", size, os.environ["LOCAL_WORLD_SIZE"]):
            say(f"ranks     {size}, as RANK and WORLD_SIZE say; --world_size {asked} has no effect")
        log = cfg.resolved_output_dir / exit_report.LOGS / f"rank{os.environ['RANK']}.log"
        hooks.enable_stack_dumps(log)
        join_and_run(argv, is_alone=True)
        return errors.DONE
    argv, saved = preflight.expand_resume(argv, say)
    argv = adapter.expand_init(argv) if saved is None else argv
    cfg, given = config.parse(argv, say=say), config.given(argv)
    if saved is not None and _is_done(saved, cfg, is_silent, say):
        return errors.DONE
    plan = launch.plan_run(cfg, given)
    plans.announce(plan, say)
    if saved is None:
        adapter.check_init(plan.cfg, plan.info, say)
    preflight.check(plan, saved, plan.info.digest(1))
    hub.check(cfg.push_to_hub)
    for line in serving.notes(cfg):
        say(line)
    _watch(cfg)
    code = launch.supervise(launch.Attempt(cfg, argv, plan, **followed))
    if code == errors.DONE:
        hub.push(cfg.resolved_output_dir, cfg.push_to_hub)
    return code


def _tell_ranks(error: errors.UserError) -> None:
    """A rank that fails before it has met the others tells them."""
    with contextlib.suppress(errors.UserError):
        if launch.is_rank(os.environ) and not hooks.is_supervised():
            os.environ.update(launch.rank_env(os.environ, config.TrainConfig()))
            from fsdp_qlora.distributed import world as worlds

            worlds.tell(error)


@cli.safe_output()
def main(argv: list[str], **followed: Any) -> int:
    """Run the command line `argv`; every error is one line. Returns the exit code."""
    try:
        return launch_ranks(argv, **followed)
    except errors.UserError as error:
        lines = [f"error: {error}", *getattr(error, "__notes__", ())]
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        _tell_ranks(error)
        return error.code
    except KeyboardInterrupt as stop:
        is_told = isinstance(stop, errors.Stopped) and not hooks.is_supervised()
        if is_told and os.environ.get("RANK") == "0":
            print(stop, file=sys.stderr)
        exit_report.leave(getattr(stop, "code", errors.SIGINT))
