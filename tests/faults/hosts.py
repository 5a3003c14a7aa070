"""Two hosts of workers, each with its own network: one is cut off or frozen, and the other takes over its lanes.

`python -m tests.faults.hosts` runs this part alone. It needs root and `ip`. Both hosts run the lanes of the same
destinations, under load, from one PostgreSQL. One host is cut off or frozen while two of its handlers run. The other
host must take over its lanes. When the first host returns it finishes its handlers late, and their outcomes must not
count. Afterwards the site is checked as after the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from receiver.simulator.feed import FeedSimulator
from tests.faults.load import name_of
from tests.faults.network import missing
from tests.faults.networked_site import NetworkedInstallation, frozen, networked_site
from tests.faults.recovery_times import LONGEST, TAKEN_OVER, RecoveryBench, Results, occurs, start_all
from tests.faults.report import Progress, Section
from tests.faults.site import Host
from tests.support.waiting import until

_DESTINATION: Final = "lab"
# Handlers that are interrupted: one writes to our database, one calls an external system.
_HANDLERS: Final = ("book", "outside")

_HELD: Final = """
SELECT lane, epoch FROM lanes l WHERE owner = :owner
AND EXISTS (SELECT FROM deliveries d WHERE d.lane = l.lane AND d.state = 'pending')"""
_OWNER: Final = "SELECT name FROM workers WHERE pid = :pid ORDER BY seen_at DESC LIMIT 1"
_STILL: Final = "SELECT lane FROM lanes WHERE owner = :owner AND lane = ANY(:lanes)"
# The attempts that succeeded, with their workers.
_DONE: Final = """
SELECT d.handler, a.worker, a.ended_at FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id
JOIN messages m ON m.id = d.message_id
WHERE m.log_id = ANY(:messages) AND d.handler = ANY(:handlers) AND a.outcome = 'succeeded'"""
# Attempts that were recorded under a lease that another worker had by then.
_LATE: Final = """
SELECT d.lane, a.ended_at FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id
JOIN unnest(:lanes ::text[], :epochs ::bigint[]) AS h(lane, epoch) ON h.lane = d.lane AND a.epoch <= h.epoch
WHERE a.worker = :owner AND a.ended_at > :taken"""
_BOOKED: Final = """
SELECT t.name, b.booked, (SELECT count(*) FROM deliveries d WHERE d.destination_id = t.id AND d.handler = 'book'
                          AND d.state = 'succeeded') AS succeeded
FROM beds b JOIN destinations t ON t.name = b.destination"""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockedHost:
    """A host whose handlers are blocked. `gates`: the files that block them, by handler."""

    host: Host
    owner: str
    messages: Sequence[str]
    gates: Mapping[str, Path]


def _block_one_host(here: NetworkedInstallation) -> BlockedHost:
    """Block both handlers on one host, and none on the other."""
    blocking: dict[str, Path] = {}
    messages: list[str] = []
    host: Host | None = None
    seeds = itertools.count(time.time_ns())
    with FeedSimulator(
        here.target(_DESTINATION).redox(), name="blocked", time_scale=0.02, ledger=here.sent[_DESTINATION]
    ) as feed:
        for handler in _HANDLERS:
            while handler not in blocking:
                body = here.target(_DESTINATION).redox().body("Results.New", seed=next(seeds))
                message = name_of(body)
                gates = {each.root: here.gate(handler, message, host=each) for each in here.distant.values()}
                feed.deliver(body)
                until(lambda: _inside(here, message, handler))  # noqa: B023 - called at once
                found = _inside(here, message, handler)
                if host is None or found is host:
                    host = found
                    blocking[handler] = gates.pop(found.root) if found is not None else Path()
                    messages.append(message)
                for each in gates.values():
                    each.unlink()
    assert host is not None
    return BlockedHost(
        host=host, owner=here.rows(_OWNER, pid=host.workers[-1].pid)[0]["name"], messages=messages, gates=blocking
    )


def _inside(here: NetworkedInstallation, message: str, handler: str) -> Host | None:
    """Return the host whose worker is blocked in that handler."""
    workers = {worker.pid: host for host in here.distant.values() for worker in host.workers}
    calls = (
        line["worker"]
        for line in here.journal()
        if (line["message"], line["handler"], line["phase"]) == (message, handler, "inside")
    )
    return next((workers[pid] for pid in calls if pid in workers), None)


def _interrupt(
    bench: RecoveryBench,
    here: NetworkedInstallation,
    fault: str,
    interrupt: Callable[[Host], AbstractContextManager[None]],
    *,
    finish_during: bool,
) -> None:
    """Interrupt a host whose handlers are blocked until the other host has handled their messages; then let it return.

    `finish_during`: unblock its handlers at once, so that they finish unheard; otherwise when it returns.
    """
    blocked = _block_one_host(here)
    held = here.rows(_HELD, owner=blocked.owner)
    lanes = [row["lane"] for row in held]
    began, interrupted = time.monotonic(), bench.now()
    with interrupt(blocked.host):
        if finish_during:
            _unblock(blocked)
        taken = occurs(lambda: not here.rows(_STILL, owner=blocked.owner, lanes=lanes))
        moment = bench.now()
        bench.results.add(
            fault,
            f"the other host runs its lanes ({len(held)})",
            time.monotonic() - began if taken else None,
            TAKEN_OVER,
        )
        for handler in _HANDLERS:
            done = occurs(lambda: _done(here, blocked, handler))  # noqa: B023 - called at once
            bench.results.add(
                fault,
                f"the other host has handled its message ({handler})",
                (_done(here, blocked, handler)[0]["ended_at"] - interrupted).total_seconds() if done else None,
                LONGEST,
            )
        bench.results.violations += [
            f"{fault}: {row['handler']} succeeded on the host that was interrupted"
            for handler in _HANDLERS
            for row in _done(here, blocked, handler)
            if row["worker"] == blocked.owner
        ]
        if not finish_during:
            _unblock(blocked)
    back = bench.now()
    until(lambda: _returned(here, blocked, back), seconds=LONGEST)
    bench.recovered(f"{fault}, after its return")
    bench.results.violations += [
        f"{fault}: {row['lane']} was recorded under an expired lease, at {row['ended_at']:%X}"
        for row in here.rows(
            _LATE, owner=blocked.owner, lanes=lanes, epochs=[row["epoch"] for row in held], taken=moment
        )
    ]
    for handler in _HANDLERS:
        if len(_done(here, blocked, handler)) != 1:
            bench.results.violations.append(f"{fault}: {handler} succeeded {len(_done(here, blocked, handler))} times")


def _unblock(blocked: BlockedHost) -> None:
    for gate in blocked.gates.values():
        gate.unlink()


def _done(here: NetworkedInstallation, blocked: BlockedHost, handler: str) -> list[dict[str, Any]]:
    message = blocked.messages[_HANDLERS.index(handler)]
    return here.rows(_DONE, messages=[message], handlers=[handler])


def _returned(here: NetworkedInstallation, blocked: BlockedHost, since: object) -> bool:
    """Return whether a worker of the host has reached the database again, under its old name or a new one."""
    blocked.host.revive()
    pids = [each.pid for each in blocked.host.workers]
    return bool(
        here.rows("SELECT 1 AS one FROM workers WHERE pid = ANY(:pids) AND seen_at > :since", pids=pids, since=since)
    )


def cut_off(bench: RecoveryBench, here: NetworkedInstallation) -> None:
    """Cut the link of a host. Its handlers finish during the cut."""
    _interrupt(bench, here, "a host cut off", here.cut, finish_during=True)


def host_frozen(bench: RecoveryBench, here: NetworkedInstallation) -> None:
    """Freeze all processes of a host. Minutes later they continue where they were."""
    _interrupt(bench, here, "a host frozen", frozen, finish_during=False)


PARTS: Final[dict[str, Callable[[RecoveryBench, NetworkedInstallation], None]]] = {
    "cut": cut_off,
    "frozen": host_frozen,
}


_TEXT: Final = """\
The receiver and PostgreSQL run on one host, workers on two other hosts. Each worker host is a network namespace with
its own link. Leases have their default length of 30 s, and the load is as above. One host is interrupted while two of
its handlers run: `book` has a row locked in our database, `outside` works elsewhere. When a host is cut off, its
handlers finish during the cut. When it is frozen, they finish after it continues. Afterwards the site is checked as
above, each row that `book` changes was changed once for each success, and nothing is recorded under an expired lease.

| fault | measured | s | bound, s |
|---|---|--:|--:|
{figures}
"""
_TITLE: Final = "A worker host cut off, and one frozen"


def measure(progress: Progress, *, only: Sequence[str] = ()) -> Section:
    """Interrupt a host in each way. `only`: names in PARTS."""
    results = Results(progress=progress)
    command = "python -m tests.faults.hosts" + "".join(f" --only {each}" for each in only)
    if (why := missing()) is not None:
        results.skip(f"a host cut off, a host frozen: {why}")
        return Section(title=_TITLE, command=command, text=f"**Skipped**: {why}.")
    with networked_site() as here:
        start_all(here, "--workers", "0")
        bench = RecoveryBench(here, results)
        for seed, (name, part) in enumerate(PARTS.items(), 1):
            if not only or name in only:
                with bench.load(seed):
                    part(bench, here)
                results.violations += [
                    f"beds of {row['name']}: booked {row['booked']} times, {row['succeeded']} succeeded"
                    for row in here.rows(_BOOKED)
                    if row["booked"] != row["succeeded"]
                ]
    return Section(
        title=_TITLE, command=command, violations=tuple(results.violations), text=_TEXT.format(figures=results.table())
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns the exit status: 0 if there was no violation."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.hosts",
        description="Cut off a worker host, freeze another, and check that the other host takes over its lanes.",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(PARTS),
        default=[],
        metavar="PART",
        help="Run only this part. May be repeated.",
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that networks and directories are removed
    made = measure(lambda line: print(line, flush=True), only=options.only)
    print(f"\n{made.text}\n" + "".join(f"VIOLATION {each}\n" for each in made.violations))
    return 1 if made.violations else 0


if __name__ == "__main__":
    sys.exit(main())
