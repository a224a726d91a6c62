"""Ranks that cannot talk are found at the start: world.check_links."""

import dataclasses
import time
from pathlib import Path

from fsdp_qlora.distributed import world as ranks
from fsdp_qlora.distributed.exit_report import LinkError
from tests.ranks import run_ranks

LONG_S, SHORT_S = 60.0, 0.3


def links(world: ranks.World, given_up: Path) -> list[str]:
    """What is said of good links, of numbers that arrive wrong, and of a peer that is late."""
    said = []
    liar = dataclasses.replace(world, rank=0)
    short_s = LONG_S if world.rank else SHORT_S
    for me, limit_s, is_late in ((world, LONG_S, 0), (liar, LONG_S, 0), (world, short_s, 1)):
        while is_late and world.rank and not given_up.exists():
            time.sleep(0.01)
        try:
            ranks.check_links(me, limit_s)
            said.append("")
        except LinkError as error:
            said.append(str(error))
        if is_late:
            given_up.touch()
    return said


def test_a_megabyte_that_does_not_arrive_whole_and_in_time_is_an_error(tmp_path: Path):
    """Real gloo ranks; the late one finds its peer's numbers waiting."""
    wrong = "numbers arrive wrong at the other ranks"
    late = "no answer from the other ranks in 0 s"
    assert run_ranks(links, 2, tmp_path / "given up") == [["", wrong, late], ["", wrong, ""]]
