"""A host whose clock is wrong: ten minutes ahead of the database's, and ten minutes behind.

`python -m tests.faults.clocks` runs it alone; it needs Debian's package faketime. The first host, receiver and worker,
lives by the wrong clock; a second one by the right one; the load and a feed that signs with a time stamp are Redox's.
Afterwards everything is judged as after the rounds.
"""

from __future__ import annotations

import itertools
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from receiver.simulator.feed import FeedSimulator
from receiver.simulator.signer import Signer
from tests.faults.recovery import Bench, Found, figures, worker_killed, working
from tests.faults.report import Section, Tell
from tests.faults.site import ROOT, Host, Site, site
from tests.support.waiting import until

WRONG: Final = 600
# How far a signature's time stamp may be from the truth, and one that is too old.
_TOLERANCE: Final = 300
_OLD: Final = 2 * _TOLERANCE
_SIGNED: Final = 100
_DESTINATION: Final = "signed"
_SIGNATURE: Final = ("x-redox-signature", "x-redox-time")
# By so much, in seconds, the two may differ on a machine at its limit.
_APART: Final = 30
_COMMAND: Final = "python -m tests.faults.clocks"
_TITLE: Final = "A host whose clock is wrong"

_MISFILED: Final = """
SELECT count(*) AS n FROM messages WHERE received_at NOT BETWEEN :began ::timestamptz - make_interval(secs => :apart)
AND clock_timestamp() + make_interval(secs => :apart)"""
_TWICE: Final = """
SELECT delivery_id AS id, count(*) AS n FROM delivery_attempts WHERE outcome = 'succeeded'
GROUP BY delivery_id HAVING count(*) > 1 ORDER BY delivery_id"""


def library() -> Path | None:
    """What makes a wrong clock for a process, where it is installed."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


def set_wrong(host: Host, seconds: int, by: Path) -> None:
    """Let every process of the host see the time of the calendar so much later. The monotonic clock stays right."""
    host.environment |= {
        "LD_PRELOAD": str(by),
        "FAKETIME": f"{seconds:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        "PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'skewed'}:{ROOT}",
    }


@contextmanager
def _wrong_by(seconds: int, by: Path) -> Iterator[Site]:
    with site() as here:
        set_wrong(here.first, seconds, by)
        working(here, "--workers", "1")
        yield here


def _signed(here: Site, found: Found, fault: str) -> None:
    """A feed that signs, by the right time; and somebody who sends what was signed ten minutes ago."""
    header, timestamp = _SIGNATURE
    signer = Signer(secret=secrets.token_hex(32).encode(), header=header, timestamp_header=timestamp)
    here.first.register(_DESTINATION, "--require", "hmac+token")
    here.first.run(
        "credential",
        "add",
        _DESTINATION,
        "--kind",
        "hmac",
        "--secret-file",
        "-",
        "--header",
        header,
        "--timestamp-header",
        timestamp,
        "--tolerance",
        str(_TOLERANCE),
        stdin=signer.secret.decode(),
    )
    target = replace(here.target(_DESTINATION), signer=signer)
    redox, seeds = target.redox(), itertools.count()
    until(lambda: redox.handshake_post().passed)  # the destination is known
    statuses: Counter[int | None] = Counter()
    with FeedSimulator(redox, name=_DESTINATION, attempts=1, ledger=here.sent[_DESTINATION]) as feed:
        for _ in range(_SIGNED):
            statuses[feed.deliver(redox.body("Results.New", seed=next(seeds))).answer.status] += 1
    body = redox.body("Results.New", seed=next(seeds))
    old = redox.send(body, headers=dict(signer.headers(body, now=time.time() - _OLD))).status
    found.tell(f"{fault}: signed now: {dict(statuses)}; signed {_OLD} s ago: {old}")
    if set(statuses) != {200}:
        found.wrong.append(f"{fault}: what was signed just before was answered {dict(statuses)}")
    if old != 401:
        found.wrong.append(f"{fault}: what was signed {_OLD} s before was answered {old}")


def _told(here: Site, found: Found, fault: str, seconds: int) -> None:
    """The host says how its clock stands, and the other one, whose is right, does not."""
    said = {
        host.root.name: [each["text"] for code, each in host.findings().items() if code == "clock"]
        for host in (here.first, here.second)
    }
    found.tell(f"{fault}: {said}")
    if not said["first"] or ("ahead" if seconds > 0 else "behind") not in said["first"][0] or said["second"]:
        found.wrong.append(f"{fault}: `status` says {said}")


def _one(found: Found, seconds: int, by: Path, seed: int) -> None:
    fault = f"a clock {abs(seconds) // 60} minutes {'ahead' if seconds > 0 else 'behind'}"
    with _wrong_by(seconds, by) as here:
        bench = Bench(here, found)
        began: datetime = bench.now() - timedelta(minutes=2)
        with bench.load(seed):
            bench.well_again(f"{fault}, under load")
            worker_killed(bench, f"{fault}, a worker killed")
            _signed(here, found, fault)
        _told(here, found, fault, seconds)
        misfiled = here.rows(_MISFILED, began=began, apart=_APART)[0]["n"]
        if misfiled:
            found.wrong.append(f"{fault}: {misfiled} messages bear another time than the database's")
        found.wrong += [f"{fault}: delivery {row['id']} succeeded {row['n']} times" for row in here.rows(_TWICE)]


_TEXT: Final = """\
The receiver and a worker live by a clock that is {minutes} minutes wrong (libfaketime), a second worker by the
database's; leases of 30 s as by default, and load as above. {signed} messages of a feed that signs them with the right
time, of which {tolerance} s are tolerated, are answered 200, and what was signed {old} s before is refused; every
message bears the database's time; no delivery succeeds twice; `status` says how the clock stands.

| what happened | measured | s | at most, s |
|---|---|--:|--:|
{figures}
"""


def measure(tell: Tell) -> Section:
    """Ahead, then behind."""
    found = Found(tell=tell)
    by = library()
    if by is None:
        why = "libfaketime is not here (on Debian: apt-get install faketime)"
        found.skip(f"a host whose clock is wrong: {why}")
        return Section(title=_TITLE, command=_COMMAND, text=f"**Skipped**: {why}.")
    for seed, seconds in enumerate((WRONG, -WRONG), 1):
        _one(found, seconds, by, seed)
    return Section(
        title=_TITLE,
        command=_COMMAND,
        violations=tuple(found.wrong),
        text=_TEXT.format(minutes=WRONG // 60, signed=_SIGNED, tolerance=_TOLERANCE, old=_OLD, figures=figures(found)),
    )


def main() -> int:
    """The exit status: 0 when nothing was violated."""
    made = measure(lambda line: print(line, flush=True))
    print(f"\n{made.text}\n" + "".join(f"VIOLATED {each}\n" for each in made.violations))
    return 1 if made.violations else 0


if __name__ == "__main__":
    sys.exit(main())
