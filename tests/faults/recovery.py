"""Recovery times: each fault once, under load, with figures and, where one is promised, a bound.

`python -m tests.faults.recovery` runs this part alone. Leases have their default length. Afterwards the site is checked
as after the rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import psutil

from receiver.simulator.feed import FeedSimulator
from tests.faults import outages
from tests.faults.database_recovery import (
    all_killed,
    database_away,
    database_comes_back,
    database_unusable,
    disk_full,
    own_database,
)
from tests.faults.load import name_of
from tests.faults.recovery_times import TAKEN_OVER, RecoveryBench, Results, occurs, start_all
from tests.faults.report import Progress, Section
from tests.faults.site import Installation, receiver_workers, site
from tests.support.postgres import open_directory
from tests.support.processes import gone
from tests.support.waiting import until

# Seconds of a long outage: the workers' engines give up several times.
AWAY: Final = 300.0
_DISK: Final = "400m"

_OWNER: Final = "SELECT name FROM workers WHERE pid = :pid ORDER BY seen_at DESC LIMIT 1"
# Lanes without pending deliveries need no worker.
_HELD: Final = """
SELECT lane FROM lanes l WHERE owner = :owner
AND EXISTS (SELECT FROM deliveries d WHERE d.lane = l.lane AND d.state = 'pending')"""


def receiver_killed(bench: RecoveryBench) -> None:
    """Kill a gunicorn worker, then the gunicorn master."""
    here = bench.site
    os.kill(receiver_workers(here.first)[0], signal.SIGKILL)
    bench.recovered("gunicorn worker killed")
    os.kill(here.first.part("receiver"), signal.SIGKILL)
    bench.recovered("gunicorn master killed")


def receiver_terminated(bench: RecoveryBench) -> None:
    """Send SIGTERM to the receiver, which `up` restarts. Then send it to `up`, and start it again."""
    here = bench.site
    began = time.monotonic()
    master = psutil.Process(here.first.part("receiver"))
    processes = [master, *master.children(recursive=True)]
    master.terminate()
    until(lambda: all(map(gone, processes)))
    bench.results.add("SIGTERM of the receiver", "until it had ended", time.monotonic() - began)
    bench.recovered("SIGTERM of the receiver")
    bench.not_recorded("SIGTERM of the receiver", began, time.monotonic())

    began = time.monotonic()
    assert here.first.process is not None
    here.first.process.terminate()
    status, _ = here.first.ended()
    ended = time.monotonic()
    bench.results.add("SIGTERM of `up`", "until all processes had ended", ended - began)
    if status != 0:
        bench.results.violations.append(f"SIGTERM of `up`: exit status {status}")
    here.first.up("--workers", "1", bind=here.first.url.removeprefix("http://"))
    bench.recovered("SIGTERM of `up`")
    bench.not_recorded("SIGTERM of `up`", began, ended)


def worker_killed(bench: RecoveryBench, fault: str = "worker killed") -> None:
    """Kill a worker and its handler processes while a handler runs."""
    here = bench.site
    redox = here.target("lab").redox()
    body = redox.body("Results.New", seed=time.time_ns())
    message = name_of(body)
    gate = here.gate("outside", message)
    with FeedSimulator(redox, name="blocked", time_scale=0.02, ledger=here.sent["lab"]) as feed:
        feed.deliver(body)
    until(lambda: _calls(here, message, "inside"))
    worker = psutil.Process(_calls(here, message, "inside")[0]["worker"])
    owner = here.rows(_OWNER, pid=worker.pid)[0]["name"]
    began = time.monotonic()
    for each in (worker, *worker.children(recursive=True)):
        each.kill()
    gate.unlink()
    held = len(here.rows(_HELD, owner=owner))
    until(lambda: gone(worker))
    here.second.revive()
    taken = occurs(lambda: not here.rows(_HELD, owner=owner))
    bench.results.add(
        fault, f"another worker runs its lanes ({held})", time.monotonic() - began if taken else None, TAKEN_OVER
    )
    done = occurs(lambda: _calls(here, message, "done"))
    bench.results.add(fault, "its message handled", time.monotonic() - began if done else None, TAKEN_OVER)


def _calls(here: Installation, message: str, phase: str) -> list[dict[str, Any]]:
    """Return the calls that the handler `outside` made for that message."""
    return [
        line
        for line in here.journal()
        if (line["message"], line["handler"], line["phase"]) == (message, "outside", phase)
    ]


@contextmanager
def _bench(made: AbstractContextManager[Installation], results: Results) -> Iterator[RecoveryBench]:
    """A worker under `up` on the first host, another on the second host, with default leases."""
    with made as here:
        start_all(here, "--workers", "1")
        yield RecoveryBench(here, results)


def _all_at_once(results: Results) -> None:
    disk = open_directory()
    try:
        with _bench(own_database(disk), results) as bench, bench.load(6):
            all_killed(bench)
    finally:
        shutil.rmtree(disk)


def _on_a_small_disk(results: Results) -> None:
    if os.geteuid() != 0:
        results.skip("PostgreSQL out of disk: only root can mount a small disk")
        return
    disk = open_directory()
    try:
        with outages.small_disk(disk, _DISK), _bench(own_database(disk), results) as bench, bench.load(5):
            disk_full(bench)
    finally:
        disk.rmdir()


def measure(progress: Progress, *, away: float = AWAY, only: Sequence[str] = ()) -> Section:
    """Inject each fault once. `away`: seconds of the long outage. `only`: names in PARTS."""
    results = Results(progress=progress)
    wanted = [name for name in PARTS if not only or name in only]
    if any(name not in _OWN for name in wanted):
        with _bench(site(), results) as bench:
            for seed, name in enumerate(wanted, 1):
                if name not in _OWN:
                    with bench.load(seed, feed_timeout=200 + away):
                        PARTS[name](bench, away)
    for name, run in _OWN.items():
        if name in wanted:
            run(results)
    return section(
        results,
        "python -m tests.faults.recovery"
        + "".join(f" --only {each}" for each in only)
        + ("" if away == AWAY else f" --away {away:g}"),
    )


PARTS: Final[dict[str, Callable[[RecoveryBench, float], None]]] = {
    "database": lambda bench, _: database_comes_back(bench),
    "unusable": lambda bench, _: database_unusable(bench),
    "receiver": lambda bench, _: receiver_killed(bench),
    "terminate": lambda bench, _: receiver_terminated(bench),
    "worker": lambda bench, _: worker_killed(bench),
    "away": database_away,
    "all": lambda bench, _: all_killed(bench),
    "disk": lambda bench, _: disk_full(bench),
}
# Parts that need their own site, on which `up` runs the database.
_OWN: Final[dict[str, Callable[[Results], None]]] = {"all": _all_at_once, "disk": _on_a_small_disk}

_TEXT: Final = """\
Two workers on two hosts, with default leases of 30 s. The load is as above. A feed waits up to 1.2 s before it tries
again; the figures include this. "Delivering again" means that both workers deliver, for each handler and destination.
Promised times have a bound.

| fault | measured | s | bound, s |
|---|---|--:|--:|
{figures}
{skipped}"""


def section(results: Results, command: str) -> Section:
    """Return the chapter of the report."""
    return Section(
        title="Recovery times",
        command=command,
        violations=tuple(results.violations),
        text=_TEXT.format(
            figures=results.table(), skipped="".join(f"\n**Skipped**: {each}.\n" for each in results.skipped)
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure from the command line. Returns the exit status: 0 if there was no violation."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.recovery", description="Measure recovery times.")
    parser.add_argument(
        "--away",
        type=float,
        default=AWAY,
        metavar="SECONDS",
        help="Duration of the long PostgreSQL outage. Default: %(default)g.",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(PARTS),
        default=[],
        metavar="PART",
        help=f"Run only this part. May be repeated. One of: {', '.join(PARTS)}.",
    )
    options = parser.parse_args(arguments)
    made = measure(lambda line: print(line, flush=True), away=options.away, only=options.only)
    print(f"\n{made.text}\n" + "".join(f"VIOLATION {each}\n" for each in made.violations))
    return 1 if made.violations else 0


if __name__ == "__main__":
    sys.exit(main())
