"""Random faults under load, one in each round. Afterwards the site is checked as if there had been none.

`./tests/faults/run --rounds N` runs this part alone. The same seed gives the same faults in the same order; the exact
moments vary.
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
from tests.faults.fail_points import triggered
from tests.faults.faults import FAULTS, Fault, handler_processes
from tests.faults.load import FAMILY, STRANGER, Load
from tests.faults.report import Progress, Section
from tests.faults.site import Installation, site
from tests.support.waiting import until

DESTINATIONS: Final = ("lab", "ward")
FEEDS: Final = 2  # to each destination
# Seconds after a fault until every feed must be accepted again.
_ACCEPTING_TIMEOUT: Final = 60.0
# Seconds after a fault in which its effect may first be seen.
_SETTLING: Final = 1.0
# Seconds after the load until every delivery must have ended.
_DELIVERING_TIMEOUT: Final = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One fault: how long it lasted, and how long after it every feed was accepted again, in seconds."""

    fault: str
    lasted: float
    accepting: float | None


@dataclass(kw_only=True)
class Run:
    """The result of all rounds. `delivering`: seconds from the end of the load until all deliveries had ended."""

    seed: int
    rounds: list[Round] = field(default_factory=list)
    delivering: list[float] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def order(seed: int, rounds: int, faults: Sequence[Fault] = FAULTS) -> Iterator[Fault]:
    """Yield the faults in random order: each once before any comes again."""
    dice = random.Random(seed)
    given = 0
    while given < rounds:
        for fault in dice.sample(faults, len(faults)):
            if given < rounds:
                yield fault
                given += 1


def run(
    seed: int,
    rounds: int,
    *,
    faults: Sequence[Fault] = FAULTS,
    check_every: int = 7,
    seconds: float = math.inf,
    progress: Progress = lambda _: None,
) -> Run:
    """Run that many rounds, or as many as begin within `seconds`. Check after every few rounds, and at the end."""
    result = Run(seed=seed)
    dice = random.Random(seed + 1)
    with site() as here:
        here.first.environment["RECEIVER_PAUSE_AFTER_DEAD"] = "1000000"
        here.second.environment["RECEIVER_PAUSE_AFTER_DEAD"] = "1000000"
        here.first.up("--workers", "1")
        here.second.work()
        for destination in DESTINATIONS:
            here.open(destination)
        left = list(order(seed, rounds, faults))
        leg = 0
        ends = time.monotonic() + seconds
        while left and not result.violations and time.monotonic() < ends:
            load = Load(here, DESTINATIONS, feeds=FEEDS, seed=seed * 100 + leg)
            load.start()
            for fault in left[:check_every]:
                if time.monotonic() < ends:
                    result.rounds.append(_round(here, fault, dice))
                    progress(
                        f"{len(result.rounds):4} {fault.__name__}: accepting again after "
                        f"{_seconds(result.rounds[-1].accepting)}"
                    )
            left = left[check_every:]
            load.stop()
            began = time.monotonic()
            result.violations += load.given_up + check(here, load)
            result.delivering.append(time.monotonic() - began)
            result.violations += [
                f"round {number}: not every feed was accepted within {_ACCEPTING_TIMEOUT:g} s after {each.fault}"
                for number, each in enumerate(result.rounds, 1)
                if each.accepting is None
            ]
            progress(f"     checked: {len(result.violations)} violations")
            leg += 1
        result.counts = _counts(here)
    return result


def _round(here: Installation, fault: Fault, dice: random.Random) -> Round:
    began = time.monotonic()
    fault(here, dice)
    over = time.monotonic()
    here.second.revive()
    return Round(fault=fault.__name__, lasted=over - began, accepting=accepting_again(here, over))


def accepting_again(here: Installation, over: float) -> float | None:
    """Return the seconds from `over` (monotonic) until every feed was accepted again; None after the timeout."""
    accepting = None
    while accepting is None and time.monotonic() < over + _ACCEPTING_TIMEOUT:
        time.sleep(0.05)
        accepting = _accepting(here, over)
    return accepting


def _accepting(here: Installation, over: float) -> float | None:
    """Return the seconds from `over` until every feed was accepted again; None while a feed is not.

    The effect of a fault may be seen a moment later, so each feed must also be accepted some time after `over`.
    """
    feeds: defaultdict[str, list[Attempt]] = defaultdict(list)
    for ledger in list(here.sent.values()):
        for attempt in ledger.attempts[-500:]:
            if attempt.sent_at > over and attempt.feed.startswith(DESTINATIONS):
                feeds[attempt.feed].append(attempt)
    longest = 0.0
    for number in range(FEEDS):
        for destination in DESTINATIONS:
            attempts = feeds[f"{destination}-{number}"]
            if not any(each.accepted and each.sent_at > over + _SETTLING for each in attempts):
                return None
            failed = max(
                (each.sent_at for each in attempts if not (each.accepted or each.error == "AnswerLost")), default=None
            )
            if failed is not None:
                again = [
                    each.answered_at
                    for each in attempts
                    if each.answered_at is not None and each.accepted and each.sent_at > failed
                ]
                if not again:
                    return None
                longest = max(longest, min(again) - over)
    return longest


def check(here: Installation, load: Load) -> list[str]:
    """Return every violation: of the database and the ledgers, of access, of processes left, of secrets in output."""
    pending = "SELECT id, lane FROM deliveries WHERE state = 'pending' ORDER BY id"
    with suppress(AssertionError):
        until(lambda: not here.rows(pending), seconds=_DELIVERING_TIMEOUT)
    violations = [f"deliveries {row['id']}: still pending in {row['lane']}" for row in here.rows(pending)]
    violations += here.violations(_ACCEPTING_TIMEOUT)
    recorded = here.rows("SELECT id FROM messages WHERE log_id = ANY(:names)", names=load.unauthenticated)
    violations += [f"messages {row['id']}: recorded from a client with a wrong token" for row in recorded]
    parents = {*here.first.parts(), *(each.pid for host in here.hosts for each in host.workers)}
    for process in handler_processes(here):
        try:
            ancestors = {each.pid for each in process.parents()}
        except psutil.NoSuchProcess:
            continue
        if not ancestors & parents:
            violations.append("a handler process outlived its parent")
    return violations + _leaks(here)


def _leaks(here: Installation) -> list[str]:
    """Return every log and table in which a token, a key or the patients' name is."""
    keys = keyrings.load_keyring(here.first.data_dir / "keyring.json").keys
    canaries = Canaries(
        {
            "the patients' name": FAMILY,
            "the wrong token": STRANGER,
            **{f"the token of {name}": here.target(name).token for name in DESTINATIONS},
            **{f"the key {key.id}": key.secret for key in keys},
        }
    )
    found = []
    for host in here.hosts:
        found += canaries.within(host.log.read_bytes(), f"the log of {host.root.name}")
    found += canaries.within(here.cluster.log_path.read_bytes(), "PostgreSQL's log")
    found += canaries.in_tables(make_url(here.cluster.url).set(drivername="postgresql").render_as_string())
    return found


def _counts(here: Installation) -> dict[str, int]:
    attempts: list[Attempt] = [attempt for ledger in here.sent.values() for attempt in ledger.attempts]
    counts = {
        "requests sent": len(attempts),
        "answered 200": sum(each.status == 200 for each in attempts),
        "answered 503": sum(each.status == 503 for each in attempts),
        "answered 401": sum(each.status == 401 for each in attempts),
        "not answered": sum(each.status is None for each in attempts),
    }
    for what, query in {
        "messages recorded": "SELECT count(*) AS n FROM messages",
        "deliveries": "SELECT count(*) AS n FROM deliveries",
        "attempts of handlers": "SELECT count(*) AS n FROM delivery_attempts",
        "attempts ended by a fault": "SELECT count(*) AS n FROM delivery_attempts WHERE outcome = 'crashed'",
        "audit rows": "SELECT count(*) AS n FROM audit_events",
    }.items():
        counts[what] = here.rows(query)[0]["n"]
    counts["fail-points triggered"] = triggered(here.hosts)
    return counts


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"


_TEXT: Final = """\
{rounds} rounds with seed {seed}. Two hosts share one PostgreSQL over TCP. The load is four feeds, a client with a wrong
token, and a client that sends queries. Each round injects one fault. After every seven rounds the load stops, and
`tests/faults/checker.py` checks the result: each message that was answered 200 is in the database once, with the bytes
that were sent. Each delivery has ended, or waits for a time or an operator. Each lane kept its order. Each effect
happened once. Nothing that was refused is recorded. The audit log verifies. No handler process outlived its parent. No
token, key or patient name is in a log or a table.

| fault | times | longest, s | accepting again: median, s | worst, s |
|---|--:|--:|--:|--:|
{faults}

Every delivery had ended at most {delivering:.1f} s after the end of the load. This includes retries that handlers asked
for, and leases that had to expire.

| counted | |
|---|--:|
{counts}"""


def section(result: Run, command: str) -> Section:
    """Return the chapter of the report."""
    rows = []
    for fault in FAULTS:
        rounds = [each for each in result.rounds if each.fault == fault.__name__]
        waits = [each.accepting for each in rounds if each.accepting is not None]
        if waits:
            rows.append(
                f"| {(fault.__doc__ or '').rstrip('.')} | {len(rounds)} | "
                f"{max(each.lasted for each in rounds):.1f} | {statistics.median(waits):.2f} | "
                f"{max(waits):.2f} |"
            )
    return Section(
        title="Random faults under load",
        command=command,
        violations=tuple(result.violations),
        text=_TEXT.format(
            rounds=len(result.rounds),
            seed=result.seed,
            faults="\n".join(rows),
            delivering=max(result.delivering, default=0.0),
            counts="\n".join(f"| {what} | {count:,} |" for what, count in result.counts.items()),
        ),
    )


def measure(
    progress: Progress, *, rounds: int = len(FAULTS), seed: int | None = None, faults: Sequence[Fault] = FAULTS
) -> Section:
    """Run the rounds. Without a seed, takes a random one; the section's command contains it."""
    if seed is None:
        seed = random.SystemRandom().randrange(1_000_000)
    command = f"./tests/faults/run --rounds {rounds} --seed {seed}"
    if len(faults) < len(FAULTS):
        command += "".join(f" --only {each.__name__}" for each in faults)
    progress(command)
    return section(run(seed, rounds, faults=faults, progress=progress), command)
