"""The training with all that belongs to it: looked at before, while and after, saved as it goes."""

from collections.abc import Callable

from fsdp_qlora.data import Data
from fsdp_qlora.plan.run import RunPlan
from fsdp_qlora.results.look import Look
from fsdp_qlora.train import loop
from fsdp_qlora.train.ledger import Recorder
from fsdp_qlora.train.rows import Account
from fsdp_qlora.train.stop import StopFlag
from fsdp_qlora.training.checkpoint import Checkpointer, ResumeState


def take(
    trained: loop.Trained,
    data: Data,
    plan: RunPlan,
    recorder: Recorder,
    account: Account,
    resumed: ResumeState,
    signals: StopFlag,
    after_step: Callable[[], None],
) -> None:
    """Take the steps of a run that are left; every rank must call.

    Args:
        trained: what is trained, restored.
        data: what is learned.
        plan: of the run.
        recorder, account: of this rank.
        resumed: where the run starts.
        signals: SIGTERM and SIGINT.
        after_step: called when a step is recorded.

    Raises:
        Stopped: a signal has come; what was trained is saved.
    """
    cfg = plan.cfg
    checkpointer = Checkpointer(trained, recorder, cfg, resumed, signals)
    look = Look(trained, data, cfg, plan.info, recorder, account, resumed.step)

    def watch() -> None:
        after_step()
        look.after_step()
        checkpointer.mark_best(look.best)

    look.begin()
    loop.fit(trained, data.train, recorder, watch, checkpointer, resumed.step, cfg.seed)
    look.end()
    checkpointer.mark_best(look.best)
    checkpointer.wait()
