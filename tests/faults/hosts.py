"""Two hosts of workers, each with a network of its own, and what becomes of the lanes of one that is cut off or frozen.

`python -m tests.faults.hosts` runs it alone; it needs root and `ip`. Both drain the lanes of the same destinations,
under load, from one PostgreSQL. One of them is struck while it is in the midst of two messages: what it held is to run
on the other; and when it comes back it ends, late, what it had begun, which may count for nothing. Afterwards
everything is judged as after the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from receiver.database.embedded.cluster import DATABASE, PORT, ROLE, Cluster
from receiver.simulator.feed import FeedSimulator
from tests.faults import effects
from tests.faults.load import name_of
from tests.faults.network import Network, missing, network
from tests.faults.recovery import LONGEST, TAKEN_OVER, Bench, Found, came_about, figures, working
from tests.faults.report import Section, Tell
from tests.faults.site import Host, Site
from tests.support.postgres import open_directory
from tests.support.waiting import until

_NAMES: Final = ("second", "third")
_DESTINATION: Final = "lab"
# Handlers that are stopped in the midst: with work in our database, and with work elsewhere.
_HANDLERS: Final = ("book", "outside")

_HELD: Final = """
SELECT lane, epoch FROM lanes l WHERE owner = :owner
AND EXISTS (SELECT FROM deliveries d WHERE d.lane = l.lane AND d.state = 'pending')"""
_OWNER: Final = "SELECT name FROM workers WHERE pid = :pid ORDER BY seen_at DESC LIMIT 1"
_STILL: Final = "SELECT lane FROM lanes WHERE owner = :owner AND lane = ANY(:lanes)"
# Who has done them, each once.
_DONE: Final = """
SELECT d.handler, a.worker, a.ended_at FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id
JOIN messages m ON m.id = d.message_id
WHERE m.log_id = ANY(:messages) AND d.handler = ANY(:handlers) AND a.outcome = 'succeeded'"""
# Under a lease that was another's by then.
_LATE: Final = """
SELECT d.lane, a.ended_at FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id
JOIN unnest(:lanes ::text[], :epochs ::bigint[]) AS h(lane, epoch) ON h.lane = d.lane AND a.epoch <= h.epoch
WHERE a.worker = :owner AND a.ended_at > :taken"""
_BOOKED: Final = """
SELECT t.name, b.booked, (SELECT count(*) FROM deliveries d WHERE d.destination_id = t.id AND d.handler = 'book'
                          AND d.state = 'succeeded') AS succeeded
FROM beds b JOIN destinations t ON t.name = b.destination"""


class Networked(Site):
    """A site of which the hosts for workers have networks of their own; the receiver's host is this one."""

    def __init__(self, root: Path, reached: Network) -> None:
        super().__init__(root, handlers=effects.__name__)
        self._reached = reached
        self.cluster = Cluster(
            root / "postgres", options={"max_connections": "200", "listen_addresses": reached.address}
        )
        self.third = self._host("third")
        self.distant: Mapping[str, Host] = {"second": self.second, "third": self.third}
        for name, host in self.distant.items():
            host.prefix = reached.links[name].enter
            gates = host.root / "gates"
            gates.mkdir()
            host.environment |= {
                "DATABASE_URL": f"postgresql://{ROLE}@{reached.address}:{PORT}/{DATABASE}",
                "GATES": str(gates),
            }

    def start(self) -> None:
        """As any site; and those who come from that network are let in."""
        super().start()
        with (self.cluster.directory / "pg_hba.conf").open("a") as file:
            file.write(f"host {DATABASE} {ROLE} {self._reached.cidr} trust\n")
        self.rows("SELECT pg_reload_conf()")

    def cut(self, host: Host) -> AbstractContextManager[None]:
        """Nothing arrives there, or from there, while the block runs."""
        return next(self._reached.links[name].cut() for name, each in self.distant.items() if each is host)


@contextmanager
def frozen(host: Host) -> Iterator[None]:
    """Its workers stand still with all of their processes while the block runs; its system goes on."""
    still: list[psutil.Process] = []
    for worker in host.workers:
        # The worker first: then it starts no others.
        for process in (psutil.Process(worker.pid), *psutil.Process(worker.pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                still.append(process)
    try:
        yield
    finally:
        for process in still:
            with suppress(psutil.NoSuchProcess):
                process.resume()


@dataclass(frozen=True, kw_only=True, slots=True)
class Midst:
    """A host that is in the midst of messages. `gates`: those that it stands at, by the handler."""

    host: Host
    owner: str
    messages: Sequence[str]
    gates: Mapping[str, Path]


def _in_the_midst(here: Networked) -> Midst:
    """Have one host stand in both handlers, and the other in none."""
    standing: dict[str, Path] = {}
    messages: list[str] = []
    host: Host | None = None
    seeds = itertools.count(time.time_ns())
    with FeedSimulator(
        here.target(_DESTINATION).redox(), name="held", time_scale=0.02, ledger=here.sent[_DESTINATION]
    ) as feed:
        for handler in _HANDLERS:
            while handler not in standing:
                body = here.target(_DESTINATION).redox().body("Results.New", seed=next(seeds))
                message = name_of(body)
                gates = {each.root: here.gate(handler, message, host=each) for each in here.distant.values()}
                feed.deliver(body)
                until(lambda: _inside(here, message, handler))  # noqa: B023 - called at once
                found = _inside(here, message, handler)
                if host is None or found is host:
                    host = found
                    standing[handler] = gates.pop(found.root) if found is not None else Path()
                    messages.append(message)
                for each in gates.values():
                    each.unlink()
    assert host is not None
    return Midst(
        host=host, owner=here.rows(_OWNER, pid=host.workers[-1].pid)[0]["name"], messages=messages, gates=standing
    )


def _inside(here: Networked, message: str, handler: str) -> Host | None:
    """Whose worker stands there in that handler."""
    workers = {worker.pid: host for host in here.distant.values() for worker in host.workers}
    told = (
        line["worker"]
        for line in here.journal()
        if (line["message"], line["handler"], line["phase"]) == (message, handler, "inside")
    )
    return next((workers[pid] for pid in told if pid in workers), None)


def _struck(
    bench: Bench,
    here: Networked,
    fault: str,
    strike: Callable[[Host], AbstractContextManager[None]],
    *,
    meanwhile: bool,
) -> None:
    """Strike a host that is in the midst, until the other has done what it had begun; then let it come back.

    `meanwhile`: its handlers come to their end at once, and it is not heard; else when it comes back.
    """
    midst = _in_the_midst(here)
    held = here.rows(_HELD, owner=midst.owner)
    lanes = [row["lane"] for row in held]
    began, struck = time.monotonic(), bench.now()
    with strike(midst.host):
        if meanwhile:
            _open(midst)
        taken = came_about(lambda: not here.rows(_STILL, owner=midst.owner, lanes=lanes))
        moment = bench.now()
        bench.found.note(
            fault,
            f"its {len(held)} lanes running on the other",
            time.monotonic() - began if taken else None,
            TAKEN_OVER,
        )
        for handler in _HANDLERS:
            done = came_about(lambda: _done(here, midst, handler))  # noqa: B023 - called at once
            bench.found.note(
                fault,
                f"what it was in the midst of done on the other ({handler})",
                (_done(here, midst, handler)[0]["ended_at"] - struck).total_seconds() if done else None,
                LONGEST,
            )
        bench.found.wrong += [
            f"{fault}: {row['handler']} was done by the one that was struck"
            for handler in _HANDLERS
            for row in _done(here, midst, handler)
            if row["worker"] == midst.owner
        ]
        if not meanwhile:
            _open(midst)
    back = bench.now()
    until(lambda: _heard(here, midst, back), LONGEST)
    bench.well_again(f"{fault}, and back")
    bench.found.wrong += [
        f"{fault}: {row['lane']} was recorded late, at {row['ended_at']:%X}"
        for row in here.rows(_LATE, owner=midst.owner, lanes=lanes, epochs=[row["epoch"] for row in held], taken=moment)
    ]
    for handler in _HANDLERS:
        if len(_done(here, midst, handler)) != 1:
            bench.found.wrong.append(f"{fault}: {handler} was done {len(_done(here, midst, handler))} times")


def _open(midst: Midst) -> None:
    for gate in midst.gates.values():
        gate.unlink()


def _done(here: Networked, midst: Midst, handler: str) -> list[dict[str, Any]]:
    message = midst.messages[_HANDLERS.index(handler)]
    return here.rows(_DONE, messages=[message], handlers=[handler])


def _heard(here: Networked, midst: Midst, since: object) -> bool:
    """Whether it has spoken to the database again, under its old name or, begun anew, another."""
    midst.host.revive()
    pids = [each.pid for each in midst.host.workers]
    return bool(
        here.rows("SELECT 1 AS one FROM workers WHERE pid = ANY(:pids) AND seen_at > :since", pids=pids, since=since)
    )


def cut_off(bench: Bench, here: Networked) -> None:
    """The link of a host down: what it does meanwhile is not heard."""
    _struck(bench, here, "a host cut off", here.cut, meanwhile=True)


def stands_still(bench: Bench, here: Networked) -> None:
    """All of a host's processes stopped: it goes on where it was, minutes later, and knows nothing of them."""
    _struck(bench, here, "a host frozen", frozen, meanwhile=False)


PARTS: Final[dict[str, Callable[[Bench, Networked], None]]] = {"cut": cut_off, "frozen": stands_still}


@contextmanager
def _site() -> Iterator[Networked]:
    with ExitStack() as stack:
        reached = stack.enter_context(network(_NAMES))
        made = Networked(open_directory(), reached)
        stack.callback(made.clear)
        made.start()
        yield made


_TEXT: Final = """\
The receiver and PostgreSQL on one host, workers on two others, each in a network namespace with a link of its own;
leases of 30 s as by default, and load as above. A host is struck while it is in the midst of two messages, one handler
of which has a row locked in our database (`book`), and one works elsewhere (`outside`). A host that is cut off comes to
their end meanwhile; one that is frozen does when it goes on. Afterwards everything is judged as above, each row that
`book` has changed is as many times changed as it succeeded, and nothing is recorded under a lease that had passed.

| what happened | measured | s | at most, s |
|---|---|--:|--:|
{figures}
"""
_TITLE: Final = "A host cut off, and one frozen"


def measure(tell: Tell, *, only: Sequence[str] = ()) -> Section:
    """Strike a host in each way; `only` these, by the names of PARTS."""
    found = Found(tell=tell)
    command = "python -m tests.faults.hosts" + "".join(f" --only {each}" for each in only)
    if (why := missing()) is not None:
        found.skip(f"a host cut off, a host frozen: {why}")
        return Section(title=_TITLE, command=command, text=f"**Skipped**: {why}.")
    with _site() as here:
        working(here, "--workers", "0")
        bench = Bench(here, found)
        for seed, (name, part) in enumerate(PARTS.items(), 1):
            if not only or name in only:
                with bench.load(seed):
                    part(bench, here)
                found.wrong += [
                    f"beds of {row['name']}: booked {row['booked']} times, {row['succeeded']} succeeded"
                    for row in here.rows(_BOOKED)
                    if row["booked"] != row["succeeded"]
                ]
    return Section(
        title=_TITLE, command=command, violations=tuple(found.wrong), text=_TEXT.format(figures=figures(found))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when all bounds held and nothing was violated."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.hosts",
        description="Cut a host of workers off, and freeze one, and look who does its work.",
    )
    parser.add_argument("--only", action="append", choices=list(PARTS), default=[], help="may be repeated")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is removed then too
    made = measure(lambda line: print(line, flush=True), only=options.only)
    print(f"\n{made.text}\n" + "".join(f"VIOLATED {each}\n" for each in made.violations))
    return 1 if made.violations else 0


if __name__ == "__main__":
    sys.exit(main())
