"""The steps of a run: evaluated before, while and after, saved as it goes."""

from collections.abc import Callable

from fsdp_qlora.data import Data
from fsdp_qlora.train import loop
from fsdp_qlora.train.checkpoint import Keeper
from fsdp_qlora.train.evaluate import Evaluator
from fsdp_qlora.train.ledger import Recorder


def take(
    trained: loop.Trained,
    data: Data,
    recorder: Recorder,
    evaluator: Evaluator,
    keeper: Keeper,
    first: int,
    after_step: Callable[[], None],
) -> None:
    """Take the steps of a run that are left; every rank must call.

    Args:
        trained: what is trained, restored.
        data: what is learned.
        recorder: of this rank.
        evaluator: measures it.
        keeper: saves it.
        first: steps that were taken before.
        after_step: called when a step is recorded.

    Raises:
        Stopped: a signal has come; what was trained is saved.
    """

    def watch() -> None:
        after_step()
        evaluator.after_step()
        keeper.mark_best(evaluator.best)

    evaluator.num_done = first
    evaluator.begin()
    loop.fit(trained, data.train, recorder, watch, keeper, first, evaluator.cfg.seed)
    evaluator.end()
    keeper.mark_best(evaluator.best)
    keeper.wait()
