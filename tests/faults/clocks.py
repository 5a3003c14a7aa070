"""A host whose clock is wrong: ten minutes ahead of the database's, then ten minutes behind.

`python -m tests.faults.clocks` runs this part alone. It needs Debian's package faketime. The first host, with the
receiver and a worker, has the wrong clock. The second host, the load, and a feed that signs with a timestamp have the
right one. Afterwards the site is checked as after the rounds.
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
from tests.faults.recovery import worker_killed
from tests.faults.recovery_times import RecoveryBench, Results, start_all
from tests.faults.report import Progress, Section
from tests.faults.site import ROOT, Host, Installation, site
from tests.support.waiting import until

WRONG: Final = 600
# Seconds: the tolerance for a signature's timestamp, and the age of a timestamp that is too old.
_TOLERANCE: Final = 300
_OLD: Final = 2 * _TOLERANCE
_SIGNED: Final = 100
_DESTINATION: Final = "signed"
_SIGNATURE: Final = ("x-redox-signature", "x-redox-time")
# Seconds by which the clocks may differ on a loaded machine.
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
    """Return the path of libfaketime, or None if it is not installed."""
    return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)


def set_wrong(host: Host, seconds: int, library_path: Path) -> None:
    """Shift the real-time clock of every process of the host by `seconds`. The monotonic clock stays right."""
    host.environment |= {
        "LD_PRELOAD": str(library_path),
        "FAKETIME": f"{seconds:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        "PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'skewed'}:{ROOT}",
    }


@contextmanager
def _wrong_by(seconds: int, library_path: Path) -> Iterator[Installation]:
    with site() as here:
        set_wrong(here.first, seconds, library_path)
        start_all(here, "--workers", "1")
        yield here


def _signed(here: Installation, results: Results, fault: str) -> None:
    """Send messages that are signed with the right time, and one that was signed ten minutes ago."""
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
    until(lambda: redox.handshake_post().passed)  # the receiver has loaded the destination
    statuses: Counter[int | None] = Counter()
    with FeedSimulator(redox, name=_DESTINATION, attempts=1, ledger=here.sent[_DESTINATION]) as feed:
        for _ in range(_SIGNED):
            statuses[feed.deliver(redox.body("Results.New", seed=next(seeds))).answer.status] += 1
    body = redox.body("Results.New", seed=next(seeds))
    old = redox.send(body, headers=dict(signer.headers(body, now=time.time() - _OLD))).status
    results.progress(f"{fault}: signed now: {dict(statuses)}; signed {_OLD} s ago: {old}")
    if set(statuses) != {200}:
        results.violations.append(f"{fault}: messages signed now were answered {dict(statuses)}")
    if old != 401:
        results.violations.append(f"{fault}: a message signed {_OLD} s before was answered {old}")


def _reported(here: Installation, results: Results, fault: str, seconds: int) -> None:
    """Check that `status` reports the wrong clock on the first host, and none on the second."""
    reports = {
        host.root.name: [each["text"] for code, each in host.findings().items() if code == "clock"]
        for host in (here.first, here.second)
    }
    results.progress(f"{fault}: {reports}")
    if not reports["first"] or ("ahead" if seconds > 0 else "behind") not in reports["first"][0] or reports["second"]:
        results.violations.append(f"{fault}: `status` reports {reports}")


def _run(results: Results, seconds: int, library_path: Path, seed: int) -> None:
    fault = f"a clock {abs(seconds) // 60} minutes {'ahead' if seconds > 0 else 'behind'}"
    with _wrong_by(seconds, library_path) as here:
        bench = RecoveryBench(here, results)
        began: datetime = bench.now() - timedelta(minutes=2)
        with bench.load(seed):
            bench.recovered(f"{fault}, under load")
            worker_killed(bench, f"{fault}, a worker killed")
            _signed(here, results, fault)
        _reported(here, results, fault, seconds)
        misfiled = here.rows(_MISFILED, began=began, apart=_APART)[0]["n"]
        if misfiled:
            results.violations.append(f"{fault}: {misfiled} messages have a time that is not the database's")
        results.violations += [f"{fault}: delivery {row['id']} succeeded {row['n']} times" for row in here.rows(_TWICE)]


_TEXT: Final = """\
The receiver and a worker have a clock that is {minutes} minutes wrong (libfaketime). A second worker has the database's
clock. Leases have their default length of 30 s, and the load is as above. {signed} messages that are signed with the
right time (tolerance {tolerance} s) are answered 200. A message that was signed {old} s before is refused. Every
message has the database's time. No delivery succeeds twice. `status` reports the wrong clock.

| fault | measured | s | bound, s |
|---|---|--:|--:|
{figures}
"""


def measure(progress: Progress) -> Section:
    """Run with a clock that is ahead, then with one that is behind."""
    results = Results(progress=progress)
    library_path = library()
    if library_path is None:
        why = "libfaketime is not installed (on Debian: apt-get install faketime)"
        results.skip(f"a host whose clock is wrong: {why}")
        return Section(title=_TITLE, command=_COMMAND, text=f"**Skipped**: {why}.")
    for seed, seconds in enumerate((WRONG, -WRONG), 1):
        _run(results, seconds, library_path, seed)
    return Section(
        title=_TITLE,
        command=_COMMAND,
        violations=tuple(results.violations),
        text=_TEXT.format(minutes=WRONG // 60, signed=_SIGNED, tolerance=_TOLERANCE, old=_OLD, figures=results.table()),
    )


def main() -> int:
    """Run from the command line. Returns the exit status: 0 if there was no violation."""
    made = measure(lambda line: print(line, flush=True))
    print(f"\n{made.text}\n" + "".join(f"VIOLATION {each}\n" for each in made.violations))
    return 1 if made.violations else 0


if __name__ == "__main__":
    sys.exit(main())
