"""The soak test: a steady mixed load on a real `up`, for minutes or hours, and a check for everything that grows.

`./tests/faults/soak --minutes N --rate R` is its command line. The load has messages of many kinds, repeats, queries,
wrong tokens, unknown sources and unreadable bodies. Some handlers fail, and one sends messages through the outbox.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from textwrap import fill
from typing import Final

import psycopg
from sqlalchemy import make_url

from receiver.samples import sample
from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.feed import with_attempt
from receiver.simulator.http_connection import HttpConnection
from tests.faults import steady
from tests.faults.gauges import DESIGNED, Gauges
from tests.faults.report import Progress, Section
from tests.faults.series import Verdict, assess
from tests.faults.site import ROOT
from tests.support.machine import SOURCE, Machine, machine
from tests.support.waiting import until

RATE: Final = 10.0
MINUTES: Final = 10.0
# The warm-up, as a share of the time and at most in seconds: caches, connections and processes are made on demand.
_WARM: Final = 0.3
_WARM_AT_MOST: Final = 300.0
_SAMPLES: Final = 120
_OFTEN: Final = 0.5
_SELDOM: Final = 5.0
_FEEDS: Final = 4
_PATIENTS: Final = 200
_LEGACY: Final = {"apiKey": "soak", "secret": "a-secret-of-the-fake-redox-api"}
_KINDS: Final = (
    "PatientAdmin.Arrival",
    "PatientAdmin.Transfer",
    "PatientAdmin.Discharge",
    "Results.New",
    "FHIR.PatientAdminUpdated",
    "Scheduling.New",
    "Inventory.Update",
)
# Kind of request → its share in percent.
_MIX: Final = {
    "message": 76,
    "repeat": 5,
    "query": 4,
    "wrong token": 3,
    "unknown source": 2,
    "unreadable": 1,
    "fails once": 7,
    "fails always": 2,
}
# Kind of request → the correct status, if it is not 200.
_STATUSES: Final = {"wrong token": 401, "unknown source": 403}


class SoakLoad:
    """`rate` requests a second over a few feeds, until `stop`. `counts`: by kind of request and status."""

    def __init__(self, redox: FakeRedox, unauthenticated: FakeRedox, rate: float) -> None:
        self._redox, self._unauthenticated = redox, unauthenticated
        self._pause = _FEEDS / rate
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self.counts: Counter[tuple[str, int | None]] = Counter()
        self._threads = [
            threading.Thread(target=self._feed, args=(random.Random(number),), daemon=True) for number in range(_FEEDS)
        ]

    def start(self) -> None:
        """Start to send."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop sending, and wait for the last responses."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(60)

    def _feed(self, dice: random.Random) -> None:
        due = time.monotonic() + dice.random() * self._pause
        last: bytes | None = None
        with self._redox.connect() as connection:
            while not self._stopping.wait(max(0.0, due - time.monotonic())):
                due = max(due + self._pause, time.monotonic() - 1.0)
                (what,) = dice.choices(list(_MIX), list(_MIX.values()))
                if what == "repeat" and last is None:
                    continue
                status, body = self._send(what, dice, last, connection)
                last = body if what == "message" and status == 200 else last
                with self._lock:
                    self.counts[what, status] += 1

    def _send(
        self, what: str, dice: random.Random, last: bytes | None, connection: HttpConnection
    ) -> tuple[int | None, bytes]:
        kind = {"query": "PatientSearch.Query", "fails once": steady.RAISES_ONCE, "fails always": steady.GIVES_UP}.get(
            what, dice.choice(_KINDS)
        )
        redox = self._unauthenticated if what == "wrong token" else self._redox
        seed = dice.randrange(1 << 40)
        if what == "repeat" and last is not None:
            body = with_attempt(last, f"{seed:x}")
        elif what == "unreadable":
            body = b'{"Meta": {"DataModel": "PatientAdmin", "EventType": ' + str(seed).encode()
        else:
            body = redox.body(kind, seed=seed, patient=sample.person(dice.randrange(_PATIENTS)))
        if what == "unknown source":
            body = body.replace(SOURCE.encode(), b"00000000-0000-4000-8000-00000000ffff")
        # The receiver closes the connection after a refusal.
        answer = redox.send(body, connection=None if what in _STATUSES or what == "unreadable" else connection)
        return answer.status, body


def measure(progress: Progress, minutes: float = MINUTES, rate: float = RATE, *, also: Sequence[str] = ()) -> Section:
    """Run the load for that long. `also`: modules with additional handlers."""
    with _running(also) as here, FakeRedoxApi() as api:
        load = _prepared(here, api, rate)
        gauges = Gauges(here)
        load.start()
        began = time.monotonic()
        seconds = minutes * 60
        pause = min(_SELDOM, max(_OFTEN, seconds / _SAMPLES))
        reported = 0.0
        while (now := time.monotonic() - began) < seconds:
            gauges.read(now)
            api.requests.clear()
            api.processed.clear()
            if now - reported >= 60:
                reported = now
                progress(
                    f"{now / 60:5.1f} min: {gauges.count('messages'):,} messages, "
                    f"{gauges.count('audit_events'):,} audit rows"
                )
            time.sleep(pause)  # between two measurements
        load.stop()
        warm = min(_WARM * seconds, _WARM_AT_MOST)
        verdicts = [assess(each, warm) for each in gauges.series.values()]
        violations = [_sentence(each) for each in verdicts if each.word == "growing"]
        violations += [
            f"{what}: answered {status} {count} times"
            for (what, status), count in sorted(load.counts.items(), key=str)
            if status != _STATUSES.get(what, 200)
        ]
        violations += _left_undone(gauges)
        text = _text(verdicts, gauges, load, seconds - warm)
        gauges.close()
    return Section(
        title="Soak test",
        command=f"./tests/faults/soak --minutes {minutes:g} --rate {rate:g}",
        text=text,
        violations=violations,
    )


@contextmanager
def _running(also: Sequence[str]) -> Iterator[Machine]:
    with machine() as here:
        here.environment |= {
            "RECEIVER_HANDLERS": ",".join((steady.__name__, *also)),
            "PYTHONPATH": str(ROOT),
            "RECEIVER_PAUSE_AFTER_DEAD": "1000000000",
            "TMPDIR": str(here.root),
            "HOME": str(here.root),
            "RECEIVER_REDOX_RATE": "1000000",
        }
        here.up("--workers", "1")
        yield here


def _prepared(here: Machine, api: FakeRedoxApi, rate: float) -> SoakLoad:
    """Register a destination, wait until its handlers run, and return the load for it."""
    url = make_url(here.cluster.url).set(drivername="postgresql").render_as_string()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(steady.TABLE)
        api.register_legacy(_LEGACY["apiKey"], _LEGACY["secret"])
        here.run(
            "outbound",
            "key",
            "add",
            "soak",
            "--environment",
            "development",
            "--base-url",
            api.base_url,
            "--legacy-file",
            "-",
            stdin=json.dumps(_LEGACY),
        )
        token = here.register("lab", "--reply-with", "soak").read_text().strip()
        # The worker subscribes the handlers of RECEIVER_HANDLERS once it has seen the destination.
        until(lambda: connection.execute("SELECT 1 FROM subscriptions WHERE handler = 'search'").fetchone())
    redox = FakeRedox(here.url, "lab", token, source_id=SOURCE)
    until(lambda: redox.send(redox.body("PatientSearch.Query")).status == 200)
    return SoakLoad(redox, FakeRedox(here.url, "lab", "a-wrong-token-for-the-soak-test", source_id=SOURCE), rate)


def _left_undone(gauges: Gauges) -> list[str]:
    left: Callable[[], int] = lambda: (  # noqa: E731
        gauges.count("deliveries WHERE state = 'pending'") + gauges.count("outbound_requests WHERE state = 'pending'")
    )
    with suppress(AssertionError):
        until(lambda: not left())
    return [f"{left()} deliveries and requests had not ended two minutes after the load"] if left() else []


def _sentence(verdict: Verdict) -> str:
    unit = f" {verdict.series.unit}" if verdict.series.unit else ""
    return (
        f"{verdict.series.name} is growing: from {verdict.first:,.1f} to {verdict.last:,.1f}{unit}, "
        f"{verdict.daily:+,.0f}{unit} a day"
    )


def _text(verdicts: Sequence[Verdict], gauges: Gauges, load: SoakLoad, seconds: float) -> str:
    messages = next(each for each in verdicts if each.series.name == "messages")
    sent = sum(load.counts.values())
    head = (
        f"{sent:,} requests, {messages.last:,.0f} messages. Growth is determined by linear regression over the last "
        f"{seconds / 60:.1f} minutes.\n\n| | unit | first | last | highest | a day | |\n|---|---|--:|--:|--:|--:|---|\n"
    )
    rows = "".join(
        f"| {each.series.name} | {each.series.unit} | {each.first:,.1f} | {each.last:,.1f} | {each.highest:,.1f} | "
        f"{each.daily:+,.0f} | {each.word} |\n"
        for each in sorted(verdicts, key=lambda one: (one.word, one.series.name))
        if _is_notable(each)
    )
    level = sum(not _is_notable(each) for each in verdicts)
    more = f"{level} more series are level and small."
    return f"{head}{rows}\n{more}\n\n{_bytes_each(verdicts, messages)}\n{_updates(gauges)}"


def _is_notable(verdict: Verdict) -> bool:
    """Return whether a series deserves a row: it grows, or is above its tolerance."""
    return verdict.word == "growing" or verdict.highest > verdict.series.tolerance


def _bytes_each(verdicts: Sequence[Verdict], messages: Verdict) -> str:
    """Return how many bytes a message adds to the tables that grow by design."""
    if messages.gained <= 0:
        return ""
    sizes = {each.series.name: each.gained * 1024 / messages.gained for each in verdicts if each.series.unit == "KiB"}
    parts = {table: sizes.get(f"table {table}", 0.0) + sizes.get(f"indexes of {table}", 0.0) for table in DESIGNED}
    by_table = ", ".join(
        f"{table} {size:,.0f}" for table, size in sorted(parts.items(), key=lambda part: -part[1]) if size > 1
    )
    return fill(f"Bytes a message, indexes included: {sum(parts.values()):,.0f} ({by_table}).", 120) + "\n"


def _updates(gauges: Gauges) -> str:
    by_table = "; ".join(
        f"{row['name']} {row['updates']:,}, {100 * row['hot'] // row['updates']} %, {row['vacuums']}"
        for row in gauges.updates()
    )
    return fill(f"Updates, share of HOT updates, vacuums: {by_table}.", 120) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line. Returns the exit status: 0 if there was no violation."""
    parser = argparse.ArgumentParser(
        prog="tests/faults/soak",
        description="Put a steady mixed load on a receiver, and check that nothing grows that should not.",
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help=f"Default: {MINUTES:g}.")
    parser.add_argument("--rate", type=float, default=RATE, metavar="R", help=f"Requests a second. Default: {RATE:g}.")
    options = parser.parse_args(arguments)
    section = measure(lambda line: print(line, flush=True), options.minutes, options.rate)
    print(f"\n{section.text}")
    for each in section.violations:
        print(f"VIOLATION {each}")
    print("there were violations" if section.violations else "no violations")
    return 1 if section.violations else 0


if __name__ == "__main__":
    sys.exit(main())
