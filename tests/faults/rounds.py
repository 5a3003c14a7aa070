"""Randomised rounds: under load something happens, again and again; then everything must be as if nothing had.

`./tests/faults/run --rounds N` runs them alone. The same seed gives the same mishaps in the same order; the moments are
the machine's.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

import psutil
from sqlalchemy import make_url

from receiver import keyring as keyrings
from receiver.simulator.attempt_log import Attempt
from tests.faults.canary import Canaries
from tests.faults.load import FAMILY, STRANGER, Load
from tests.faults.mishaps import MISHAPS, Mishap, handler_processes
from tests.faults.report import Section, Tell
from tests.faults.site import Site, site
from tests.faults.strikes import struck
from tests.support.waiting import until

DESTINATIONS: Final = ("lab", "ward")
FEEDS: Final = 2  # to each
# After a mishap is over: until a 200 is answered, and until all that came in by then has become something.
_ACCEPTING: Final = 60.0
_SHOWN: Final = 1.0
_DELIVERING: Final = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One mishap: how long it lasted, and how long after it every feed went on; seconds."""

    mishap: str
    lasted: float
    accepting: float | None


@dataclass(kw_only=True)
class Run:
    """What came of all rounds. `delivering`: seconds until all was done, once nothing new was sent."""

    seed: int
    rounds: list[Round] = field(default_factory=list)
    delivering: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def order(seed: int, rounds: int, mishaps: Sequence[Mishap] = MISHAPS) -> Iterator[Mishap]:
    """Every mishap once before any comes again, shuffled anew each time."""
    dice = random.Random(seed)
    given = 0
    while given < rounds:
        for mishap in dice.sample(mishaps, len(mishaps)):
            if given < rounds:
                yield mishap
                given += 1


def run(
    seed: int,
    rounds: int,
    *,
    mishaps: Sequence[Mishap] = MISHAPS,
    check_every: int = 7,
    seconds: float = math.inf,
    tell: Tell = lambda _: None,
) -> Run:
    """Run so many rounds, or as many as begin within `seconds` once everything runs; judge after every few, and at the
    end."""
    made = Run(seed=seed)
    dice = random.Random(seed + 1)
    with site() as here:
        here.first.environment["RECEIVER_PAUSE_AFTER_DEAD"] = "1000000"
        here.second.environment["RECEIVER_PAUSE_AFTER_DEAD"] = "1000000"
        here.first.up("--workers", "1")
        here.second.work()
        for destination in DESTINATIONS:
            here.open(destination)
        left = list(order(seed, rounds, mishaps))
        leg = 0
        ends = time.monotonic() + seconds
        while left and not made.wrong and time.monotonic() < ends:
            load = Load(here, DESTINATIONS, feeds=FEEDS, seed=seed * 100 + leg)
            load.start()
            for mishap in left[:check_every]:
                if time.monotonic() < ends:
                    made.rounds.append(_round(here, mishap, dice))
                    tell(
                        f"{len(made.rounds):4} {mishap.__name__}: accepting {_seconds(made.rounds[-1].accepting)} "
                        "after it"
                    )
            left = left[check_every:]
            load.stop()
            began = time.monotonic()
            made.wrong += load.given_up + judge(here, load)
            made.delivering.append(time.monotonic() - began)
            made.wrong += [
                f"round {number}: accepting again was not seen within {_ACCEPTING:g} s ({each.mishap})"
                for number, each in enumerate(made.rounds, 1)
                if each.accepting is None
            ]
            tell(f"     judged: {len(made.wrong)} violations")
            leg += 1
        made.counts = _counts(here)
    return made


def _round(here: Site, mishap: Mishap, dice: random.Random) -> Round:
    began = time.monotonic()
    mishap(here, dice)
    over = time.monotonic()
    here.second.revive()
    return Round(mishap=mishap.__name__, lasted=over - began, accepting=accepting_again(here, over))


def accepting_again(here: Site, over: float) -> float | None:
    """Seconds from `over` (monotonic) until every feed's messages were accepted again; None when that takes too long."""
    accepting = None
    while accepting is None and time.monotonic() < over + _ACCEPTING:
        time.sleep(0.05)
        accepting = _accepting(here, over)
    return accepting


def _accepting(here: Site, over: float) -> float | None:
    """Seconds after `over` until every feed's messages were accepted again; None as long as one stands still.

    What a mishap does may show a moment after it: each feed has to get through some time later too.
    """
    feeds: defaultdict[str, list[Attempt]] = defaultdict(list)
    for ledger in list(here.sent.values()):
        for attempt in ledger.attempts[-500:]:
            if attempt.sent_at > over and attempt.feed.startswith(DESTINATIONS):
                feeds[attempt.feed].append(attempt)
    longest = 0.0
    for number in range(FEEDS):
        for destination in DESTINATIONS:
            these = feeds[f"{destination}-{number}"]
            if not any(each.accepted and each.sent_at > over + _SHOWN for each in these):
                return None
            failed = max(
                (each.sent_at for each in these if not (each.accepted or each.error == "AnswerLost")), default=None
            )
            if failed is not None:
                again = [
                    each.answered_at
                    for each in these
                    if each.answered_at is not None and each.accepted and each.sent_at > failed
                ]
                if not again:
                    return None
                longest = max(longest, min(again) - over)
    return longest


def judge(here: Site, load: Load) -> list[str]:
    """Every violation: of the database and the ledgers; of strangers let in; of processes left; of secrets let slip."""
    left = "SELECT id, lane FROM deliveries WHERE state = 'pending' ORDER BY id"
    with suppress(AssertionError):
        until(lambda: not here.rows(left), _DELIVERING)
    wrong = [f"deliveries {row['id']}: still pending in {row['lane']}" for row in here.rows(left)]
    wrong += here.violations(_ACCEPTING)
    let_in = here.rows("SELECT id FROM messages WHERE log_id = ANY(:names)", names=load.strange)
    wrong += [f"messages {row['id']}: a stranger's" for row in let_in]
    parents = {*here.first.parts(), *(each.pid for host in here.hosts for each in host.workers)}
    for process in handler_processes(here):
        try:
            lines = {each.pid for each in process.parents()}
        except psutil.NoSuchProcess:
            continue
        if not lines & parents:
            wrong.append("a handler process has outlived whoever started it")
    keys = keyrings.load_keyring(here.first.data_dir / "keyring.json").keys
    canaries = Canaries(
        {
            "the patients' name": FAMILY,
            "a stranger's token": STRANGER,
            **{f"the token of {name}": here.target(name).token for name in DESTINATIONS},
            **{f"the key {key.id}": key.secret for key in keys},
        }
    )
    for host in here.hosts:
        wrong += canaries.within(host.log.read_bytes(), f"the log of {host.root.name}")
    wrong += canaries.within(here.cluster.log_path.read_bytes(), "PostgreSQL's log")
    wrong += canaries.in_tables(make_url(here.cluster.url).set(drivername="postgresql").render_as_string())
    return wrong


def _counts(here: Site) -> dict[str, int]:
    attempts: list[Attempt] = [attempt for ledger in here.sent.values() for attempt in ledger.attempts]
    counted = {
        "requests sent": len(attempts),
        "of them answered 200": sum(each.status == 200 for each in attempts),
        "answered 503": sum(each.status == 503 for each in attempts),
        "answered 401": sum(each.status == 401 for each in attempts),
        "never answered": sum(each.status is None for each in attempts),
    }
    for what, query in {
        "messages recorded": "SELECT count(*) AS n FROM messages",
        "deliveries": "SELECT count(*) AS n FROM deliveries",
        "attempts of handlers": "SELECT count(*) AS n FROM delivery_attempts",
        "of them cut short by a fault": "SELECT count(*) AS n FROM delivery_attempts WHERE outcome = 'crashed'",
        "audit rows": "SELECT count(*) AS n FROM audit_events",
    }.items():
        counted[what] = here.rows(query)[0]["n"]
    counted["strikes at fail-points"] = struck(here.hosts)
    return counted


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"


_TEXT: Final = """\
{rounds} rounds with seed {seed}. Under load from four feeds, a stranger and an asker of queries, two hosts share one
PostgreSQL over TCP. After every few rounds all of it is judged (tests/faults/checker.py): each 200 is in the database
with what was sent, once; each delivery ended, or waits for a time or a person; order in each lane; each effect once;
nothing refused was let in; the audit proves whole; no handler process outlived its parent; no token, key or patient's
name in a log or a table.

| what happened | times | lasted, s | accepting again after it: median, s | worst, s |
|---|--:|--:|--:|--:|
{mishaps}

All that had come in was done, and judged, {delivering:.1f} s after the load ended at the latest: retries that handlers
had asked for, and leases that had to end, included.

| counted | |
|---|--:|
{counts}"""


def section(made: Run, command: str) -> Section:
    """The rounds' chapter of the report."""
    rows = []
    for mishap in MISHAPS:
        these = [each for each in made.rounds if each.mishap == mishap.__name__]
        waits = [each.accepting for each in these if each.accepting is not None]
        if waits:
            rows.append(
                f"| {(mishap.__doc__ or '').rstrip('.')} | {len(these)} | "
                f"{max(each.lasted for each in these):.1f} | {statistics.median(waits):.2f} | "
                f"{max(waits):.2f} |"
            )
    return Section(
        title="Anything, at any moment",
        command=command,
        violations=tuple(made.wrong),
        text=_TEXT.format(
            rounds=len(made.rounds),
            seed=made.seed,
            mishaps="\n".join(rows),
            delivering=max(made.delivering, default=0.0),
            counts="\n".join(f"| {what} | {count:,} |" for what, count in made.counts.items()),
        ),
    )


def measure(
    tell: Tell, *, rounds: int = len(MISHAPS), seed: int | None = None, mishaps: Sequence[Mishap] = MISHAPS
) -> Section:
    """Run them, and what came of it. Without a seed a new one is taken; the section's command has it."""
    if seed is None:
        seed = random.SystemRandom().randrange(1_000_000)
    command = f"./tests/faults/run --rounds {rounds} --seed {seed}"
    if len(mishaps) < len(MISHAPS):
        command += "".join(f" --only {each.__name__}" for each in mishaps)
    tell(command)
    return section(run(seed, rounds, mishaps=mishaps, tell=tell), command)
