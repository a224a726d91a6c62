"""Ranks that cannot talk are found at the start: world.check_links."""

import dataclasses
import time

from fsdp_qlora.distributed import world as ranks
from fsdp_qlora.distributed.exit_report import LinkError
from tests.ranks import run_ranks

SHORT_S = 0.3


def links(world: ranks.World) -> list[str]:
    """What is said of good links, of numbers that arrive wrong, and of a peer that is late."""
    said = []
    liar = dataclasses.replace(world, rank=0)
    for me, limit_s, wait_s in ((world, 20, 0), (liar, 20, 0), (world, SHORT_S, 3 * SHORT_S)):
        time.sleep(wait_s * world.rank)
        try:
            ranks.check_links(me, limit_s)
            said.append("")
        except LinkError as error:
            said.append(str(error))
    return said


def test_a_megabyte_that_does_not_arrive_whole_and_in_time_is_an_error():
    """Real gloo ranks; the late one finds its peer's numbers waiting."""
    wrong = "numbers arrive wrong at the other ranks"
    late = "no answer from the other ranks in 0 s"
    assert run_ranks(links, 2) == [["", wrong, late], ["", wrong, ""]]
