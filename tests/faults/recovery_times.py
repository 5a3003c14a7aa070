"""Measures how soon a site works again after a fault: figures, their bounds, and the bench that takes them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from tests.faults.load import Load
from tests.faults.report import Progress
from tests.faults.rounds import DESTINATIONS, FEEDS, accepting_again, check
from tests.faults.site import Installation
from tests.support.waiting import until

# Promised bounds, in seconds.
ACCEPTING: Final = 5.0  # after PostgreSQL runs again
DELIVERING: Final = 30.0  # after PostgreSQL runs again
TAKEN_OVER: Final = 60.0  # after a worker was killed
ANSWERED: Final = 5.0  # each message, whatever the database does; except those that wait for their handler
# Seconds after which a recovery without a promised bound counts as failed.
LONGEST: Final = 180.0
# Handlers that workers run.
_HANDLERS: Final = ("book", "outside", "anyhow")
# Kinds that are answered only when a handler or responder has finished.
_INLINE: Final = ("Inventory.", "PatientSearch.")

_DELIVERED: Final = """
WITH done AS (
    SELECT a.worker, d.handler, d.destination_id, a.ended_at
    FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id
    WHERE a.outcome = 'succeeded' AND a.ended_at > :since AND d.handler = ANY(:handlers)),
firsts AS (
    SELECT min(ended_at) AS at, true AS by_worker FROM done GROUP BY worker
    UNION ALL SELECT min(ended_at), false FROM done GROUP BY handler, destination_id)
SELECT extract(epoch FROM max(at) - :since) AS seconds, count(*) FILTER (WHERE by_worker) AS workers,
       count(*) FILTER (WHERE NOT by_worker) AS served FROM firsts"""
_RECORDED: Final = """
SELECT m.id, m.kind, m.attempt_id FROM messages m JOIN destinations t ON t.id = m.destination_id
WHERE t.name = :destination AND m.attempt_id = ANY(:attempts) ORDER BY m.id"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A measured time after a fault. `seconds` is None if the event never occurred."""

    fault: str
    what: str
    seconds: float | None
    bound: float | None = None

    @property
    def kept(self) -> bool:
        """Whether the event occurred, and within its bound."""
        return self.seconds is not None and (self.bound is None or self.seconds <= self.bound)

    def __str__(self) -> str:
        measured = "never" if self.seconds is None else f"{self.seconds:.2f} s"
        return f"{self.fault}: {self.what} {measured}" + (
            "" if self.bound is None else f" (promised: {self.bound:g} s)"
        )


@dataclass(kw_only=True)
class Results:
    """Figures and violations. `skipped`: what could not run on this machine, and why."""

    progress: Progress
    figures: list[Figure] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, fault: str, what: str, seconds: float | None, bound: float | None = None) -> None:
        """Add a figure. A figure above its bound is a violation."""
        figure = Figure(fault=fault, what=what, seconds=seconds, bound=bound)
        self.figures.append(figure)
        self.progress(str(figure))
        if not figure.kept:
            self.violations.append(str(figure))

    def skip(self, what: str) -> None:
        """Report a part that does not run."""
        self.skipped.append(what)
        self.progress(f"!! SKIPPED: {what}")

    def table(self) -> str:
        """Return the rows of the figures' table."""
        return "\n".join(
            f"| {each.fault} | {each.what} | {'never' if each.seconds is None else f'{each.seconds:.2f}'} | "
            f"{'' if each.bound is None else f'{each.bound:g}'} |"
            for each in self.figures
        )


class RecoveryBench:
    """A site with two workers under load, and measurements on it."""

    def __init__(self, here: Installation, results: Results) -> None:
        self.site = here
        self.results = results

    @contextmanager
    def load(self, seed: int, *, feed_timeout: float = 200.0) -> Iterator[None]:
        """Keep the site under load during the block. Then check it as after the rounds."""
        load = Load(self.site, DESTINATIONS, feeds=FEEDS, seed=seed, feed_timeout=feed_timeout)
        load.start()
        try:
            yield
        finally:
            load.stop()
        violations = [*load.given_up, *check(self.site, load)]
        self.results.progress(f"checked: {len(violations)} violations")
        self.results.violations += violations

    def now(self) -> datetime:
        """Return the time by the database's clock."""
        now: datetime = self.site.rows("SELECT clock_timestamp() AS now")[0]["now"]
        return now

    def recovered(self, fault: str, *, accepting: float | None = None, delivering: float | None = None) -> None:
        """Measure from now: until every feed is accepted, and until both workers deliver for each handler.

        A message that is handled within its request waits longer if a worker that held its lane was killed: until the
        lease expires.
        """
        over, since = time.monotonic(), self.now()
        again = accepting_again(self.site, over)
        self.results.add(
            fault, "accepting again", None if again is None else self._refused_until(over, inline=False), accepting
        )
        if again is not None and (inline := self._refused_until(over, inline=True)):
            self.results.add(fault, "accepting again what is handled within the request", inline, accepting)
        self.results.add(fault, "delivering again", self._delivering(since), delivering)

    def _refused_until(self, over: float, *, inline: bool) -> float:
        """Return the seconds from `over` until the last message refused after it was accepted; 0 if none was."""
        last = 0.0
        for ledger in list(self.site.sent.values()):
            refused = {
                each.message
                for each in ledger.attempts
                if each.sent_at > over
                and each.status != 401
                and not each.accepted
                and each.error != "AnswerLost"
                and each.feed.startswith(DESTINATIONS)
                and str(each.kind).startswith("Inventory.") == inline
            }
            for name, accepted in ledger.accepted().items():
                if name in refused and accepted.answered_at is not None:
                    last = max(last, accepted.answered_at - over)
        return last

    def _delivering(self, since: datetime) -> float | None:
        rows: list[dict[str, Any]] = []

        def all_deliver() -> bool:
            rows[:] = self.site.rows(_DELIVERED, since=since, handlers=list(_HANDLERS))
            return bool(rows[0]["workers"] >= 2 and rows[0]["served"] == len(_HANDLERS) * len(DESTINATIONS))

        return float(rows[0]["seconds"]) if occurs(all_deliver) else None

    def responses(self, fault: str, began: float, over: float) -> None:
        """Measure the responses to requests that were sent during the fault."""
        during = [
            each
            for ledger in list(self.site.sent.values())
            for each in ledger.attempts
            if began <= each.sent_at < over and each.error != "AnswerLost"
        ]
        statuses = Counter(each.status or each.error for each in during)
        counted = ", ".join(f"{count} × {status}" for status, count in statuses.most_common())
        self.results.progress(f"{fault}: {counted}")
        if not statuses[503]:
            self.results.violations.append(f"{fault}: no request was answered 503, so the fault had no effect")
        self.results.violations += [
            f"{fault}: {each.message} was not answered ({each.error})" for each in during if each.answered_at is None
        ]
        took = {
            inline: [
                each.answered_at - each.sent_at
                for each in during
                if each.answered_at is not None and str(each.kind).startswith(_INLINE) == inline
            ]
            for inline in (False, True)
        }
        self.results.add(fault, "slowest response", max(took[False]), ANSWERED)
        if took[True]:
            self.results.add(fault, "slowest response to what is handled within the request", max(took[True]))

    def not_recorded(self, fault: str, began: float, over: float) -> None:
        """Check that no attempt without a response is recorded: the receiver answers what it has recorded."""
        # The feeds of two destinations send the same attempt ids.
        unanswered = {
            destination: {
                each.attempt_id: each
                for each in ledger.attempts
                if began <= each.sent_at < over and each.answered_at is None and each.error != "AnswerLost"
            }
            for destination, ledger in list(self.site.sent.items())
        }
        errors = Counter(each.error for attempts in unanswered.values() for each in attempts.values())
        self.results.progress(f"{fault}: {errors.total()} requests were not answered: {dict(errors)}")
        for destination, attempts in unanswered.items():
            for row in self.site.rows(_RECORDED, destination=destination, attempts=list(attempts)):
                sent = attempts[row["attempt_id"]]
                self.results.violations.append(
                    f"{fault}: messages {row['id']} ({row['kind']}) was recorded and not answered: "
                    f"sent {sent.sent_at - began:.2f} s after it, {sent.error}"
                )


def occurs(holds: Callable[[], object]) -> bool:
    """Wait until `holds` returns true. Returns False after LONGEST seconds."""
    try:
        until(holds, seconds=LONGEST)
    except AssertionError:
        return False
    return True


def start_all(here: Installation, *options: str) -> None:
    """Start `up` on the first host and a worker on each other host, with default leases, and open the destinations."""
    for host in here.hosts:
        host.environment["RECEIVER_PAUSE_AFTER_DEAD"] = "1000000"
        del host.environment["RECEIVER_LEASE"]
    here.first.up(*options)
    for host in here.hosts[1:]:
        host.work()
    for destination in DESTINATIONS:
        here.open(destination)
