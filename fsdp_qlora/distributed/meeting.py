"""Before the first step: the ranks of one run find each other, wait for all, and agree; no torch.

They meet in a store of torch.distributed: that of torchrun's agent, else that of rank 0. It may
outlive a start of the ranks, so each start is a round of its own, which rank 0 opens and closes.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

from fsdp_qlora.errors import ENVIRONMENT, UserError, cut, one_line

MEETING_S = 300.0  # for all ranks to come
REMIND_S, LINGER_S, POLL_S = 30.0, 20.0, 0.1
IDENTITY = "FSDP_QLORA_RUN"  # what launch.rank_env calls the run: a stranger calls it otherwise
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
MOST_ROWS, MOST_CHARS = 7, 40
Say = Callable[[str], Any]


def find_link(address: str) -> tuple[str, str]:
    """Find the way to a host.

    Args:
        address: its name or number.

    Returns:
        Our own address on it, and the name of the network link; "" for what is not known.
    """
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            own = str(probe.getsockname()[0])
    except OSError:
        return "", ""
    links = psutil.net_if_addrs().items()
    return own, next((name for name, on in links if own in [one.address for one in on]), "")


def _is_local(address: str) -> bool:
    return not address or address.startswith("127.") or address == "::1"


class _Waiting:
    """Waits a little at each call, and says every 30 s for what."""

    def __init__(self, say: Say, limit_s: float) -> None:
        self._say, self._limit_s = say, limit_s
        self._begin_s, self._num_told = time.monotonic(), 0

    def is_over(self, what: str) -> bool:
        time.sleep(POLL_S)
        waited_s = time.monotonic() - self._begin_s
        if waited_s // REMIND_S > self._num_told:
            self._num_told = int(waited_s // REMIND_S)
            self._say(f"waiting   {waited_s:.0f} s for {what}")
        return waited_s > self._limit_s


def await_server(host: str, port: int, limit_s: float, say: Say) -> None:
    """Wait until the store of rank 0, or of torchrun's agent, can be reached.

    Args:
        host, port: where it is.
        limit_s: for how long.
        say: is told every 30 s that it cannot.

    Raises:
        UserError: it could not (code 3).
    """
    waiting = _Waiting(say, limit_s)
    while True:
        try:
            socket.create_connection((host, port), REMIND_S).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if waiting.is_over(f"rank 0 at {host}:{port} ({reason})"):
            rule = f"rank 0 could not be reached for {limit_s:.0f} s ({reason})"
            remedy = "see whether it runs there, and to MASTER_ADDR and MASTER_PORT"
            raise UserError(f"{host}:{port}", rule, remedy, ENVIRONMENT)


class Meeting:
    """What ranks say in the store before there is a process group, and when one of them fails.

    Attributes:
        store: in which it is said.
        round: number of this start of the ranks, as text; "" until rank 0 is there.
        places: host, process, time and address of every rank, once all are there.
    """

    def __init__(self, store: Any, rank: int, size: int, where: str) -> None:
        """Join in.

        Args:
            store: a torch.distributed.Store.
            rank, size: number of this rank, and how many there are.
            where: host:port of the store.

        Raises:
            UserError: the store is that of another run (code 3).
        """
        self.store, self._rank, self._size, self._where = store, rank, size, where
        self._run = f"{os.environ.get(IDENTITY) or 'no name'}, {size} ranks"
        self._me, self.round, self.places = "", "", list[list[str]]()
        if rank == 0:
            self._refuse_stranger()
            store.set("run", self._run)
            self.round = str(store.add("rounds", 1))
            store.set("round", self.round)

    def hold(self, say: Say) -> None:
        """Wait until all ranks are there.

        Args:
            say: is told every 30 s who is missing.

        Raises:
            UserError: the store is another run's, another process is this rank, a rank has failed,
                or some have not come for 300 s.
        """
        own, _ = find_link(self._where.rpartition(":")[0])
        self._me = f"{socket.gethostname()} {os.getpid()} {time.time_ns()} {own}"
        waiting = _Waiting(say, MEETING_S)
        while not self._is_complete():
            self.heed_failure()
            if waiting.is_over(f"{self._missing()} at {self._where}"):
                rule = f"not at {self._where} within {MEETING_S:.0f} s"
                remedy = "see whether their hosts run, and reach that port"
                raise UserError(self._missing(), rule, remedy, ENVIRONMENT)
        self.places = [self.read(key).split(" ") for key in self._keys()]

    def _is_complete(self) -> bool:
        """Whether rank 0, alive, has seen all ranks, and this process as the one of its number."""
        if self._rank:
            self._refuse_stranger()
            self.round = self.read("round")
        if not self.round:
            return False
        closed, own = f"{self.round}/closed", self._keys()[self._rank]
        first = self.store.compare_set(own, "", self._me).decode()
        if first != self._me:  # of a round before, or
            if first.split()[:2] != self._me.split()[:2] and os.environ.get(AGENT_STORE) != "True":
                host, pid = first.split()[:2]
                got, remedy = f"rank {self._rank}", "start each rank once"
                raise UserError(got, f"is process {pid} on {host} already", remedy, ENVIRONMENT)
            return False
        if self._rank == 0 and self.store.check(self._keys()):
            self.store.set(closed, "1")
        return bool(self.store.check([closed]))

    def _keys(self) -> list[str]:
        return [f"{self.round}/{rank}" for rank in range(self._size)]

    def read(self, key: str) -> str:
        """Return what stands in the store; "" for nothing."""
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _missing(self) -> str:
        """The ranks that are not there, and the hosts of those that are."""
        if not self.round:
            return "rank 0"
        there = {i: self.read(key).split(" ")[0] for i, key in enumerate(self._keys())}
        absent = ", ".join(str(rank) for rank, host in there.items() if not host)
        known = ", ".join(f"{rank} on {host}" for rank, host in there.items() if host)
        return f"rank {absent or 'none'} of {self._size} (there: {known})"

    def _refuse_stranger(self) -> None:
        found = self.read("run")
        if found not in ("", self._run):
            rule = f"is where another run meets ({found}; this one is {self._run})"
            remedy = "give each a --master_port or MASTER_PORT of its own"
            raise UserError(self._where, rule, remedy, ENVIRONMENT)

    def link(self) -> str:
        """The network link to the other ranks; "" where it is not known."""
        address, name = find_link(self._where.rpartition(":")[0])
        far = [place[3] for place in self.places if not _is_local(place[3])]
        if _is_local(address) and far:  # /etc/hosts calls this host 127.0.1.1
            name = find_link(far[0])[1]
        return name

    def tell_failure(self, line: str, code: int, lingers: bool) -> None:
        """Let the others know that this rank fails.

        Args:
            line: what its user is told.
            code: exit code.
            lingers: the others may be on their way: wait for them, if the store ends with this
                process.
        """
        self._refuse_stranger()  # it has no say in the other run
        word = {"who": f"rank {self._rank} ({socket.gethostname()})", "line": line, "code": code}
        self.store.compare_set(self._key("failed"), "", json.dumps(word))
        if lingers:
            self._leave()

    def heed_failure(self) -> None:
        """Raise what another rank has said of its failure, if one has failed.

        Raises:
            UserError: one has; with its exit code.
        """
        text = self.read(self._key("failed"))
        if text:
            word = json.loads(text)
            self._leave()
            raise UserError(word["who"], "has failed", word["line"], word["code"])

    def _key(self, name: str) -> str:
        """Of what a rank says that may not know the round."""
        return f"{name} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    def _leave(self) -> None:
        """Be counted; the owner of the store waits a while for those that still have to hear."""
        key, limit_s = self._key("ended"), time.monotonic() + LINGER_S
        num_ended = self.store.add(key, 1)
        is_owner = self._rank == 0 and os.environ.get(AGENT_STORE) != "True"
        while is_owner and num_ended < self._size and time.monotonic() < limit_s:
            time.sleep(POLL_S)
            num_ended = self.store.add(key, 0)


def compare(every: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> None:
    """Refuse ranks that do not have the same in mind.

    Args:
        every: facts by name, by rank; a library may be there on some only.
        hosts: by rank.

    Raises:
        UserError: they differ (code 2); its notes are a table.
    """
    names = dict.fromkeys(name for facts in every for name in facts)
    rows, others = [f"{'':<24}{'rank 0':<{MOST_CHARS}}  others"], {}
    for name in names:
        values = [facts.get(name, "none") for facts in every]
        other = [rank for rank, value in enumerate(values) if value != values[0]]
        if other:
            others[name] = f"rank {other[0]} ({hosts[other[0]]})"
            pair = (one_line(str(values[rank])) for rank in (0, other[0]))
            first, second = (cut(text, MOST_CHARS) for text in pair)
            rows.append(f"{name:<24}{first:<{MOST_CHARS}}  {others[name]}: {second}")
    if others:
        who, rule = ", ".join(dict.fromkeys(others.values())), f"differ in {', '.join(others)}"
        remedy = "start all with the same options, files and versions"
        error = UserError(f"rank 0 ({hosts[0]}) and {who}", rule, remedy)
        error.__notes__ = rows[: MOST_ROWS + 1]
        raise error
