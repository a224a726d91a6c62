"""The training with all that belongs to it: looked at before, while and after, saved as it goes."""

from collections.abc import Callable

from fsdp_qlora.data import Data
from fsdp_qlora.distributed.hooks import StopFlag
from fsdp_qlora.plan.run import RunPlan
from fsdp_qlora.results.look import Look
from fsdp_qlora.train.checkpoint import Keeper
from fsdp_qlora.train.going_on import Start
from fsdp_qlora.training import loop
from fsdp_qlora.training.memory import MemoryTracker
from fsdp_qlora.training.metrics import Recorder


def take(
    trained: loop.Trained,
    data: Data,
    plan: RunPlan,
    recorder: Recorder,
    tracker: MemoryTracker,
    begin: Start,
    signals: StopFlag,
    after_step: Callable[[], None],
) -> None:
    """Take the steps of a run that are left; every rank must call.

    Args:
        trained: what is trained, restored.
        data: what is learned.
        plan: of the run.
        recorder, tracker: of this rank.
        begin: where the run starts.
        signals: SIGTERM and SIGINT.
        after_step: called when a step is recorded.

    Raises:
        Stopped: a signal has come; what was trained is saved.
    """
    cfg = plan.cfg
    keeper = Keeper(trained, recorder, cfg, begin.facts, begin.step, signals)
    look = Look(trained, data, cfg, plan.info, recorder, tracker, begin.step)

    def watch() -> None:
        after_step()
        look.after_step()
        keeper.mark_best(look.best)

    look.begin()
    loop.fit(trained, data.train, recorder, watch, keeper, begin.step, cfg.seed)
    look.end()
    keeper.mark_best(look.best)
    keeper.wait()
