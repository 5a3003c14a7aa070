"""Floods: whatever somebody sends as fast as they can, the true feed goes on, and nothing grows without end.

`python -m tests.faults.floods` is its command line. One flood after another runs against `up` with a real database,
from several addresses, while one true feed sends message after message. Then a burst of messages that are all accepted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit
from uuid import uuid4

import psutil
from sqlalchemy import Engine, text

from receiver.database.engine import open_engine
from receiver.simulator.attacks import AttackTarget
from receiver.storage.evidence.flood_control import NAMED, ROWS_IN_ALL
from tests.cli.machine import SOURCE, Machine, machine
from tests.faults.report import Section, Tell
from tests.support.waiting import until

RECEIVERS: Final = 2
# So many processes flood, each on so many connections, from an address each.
PROCESSES: Final = 2
CONNECTIONS: Final = 8
SECONDS: Final = 20.0
BURST: Final = 100_000
# What the true feed may wait for an answer, 99 times in 100.
GOAL: Final = 0.25
# Rows that a flood may leave in what a receiver takes for a minute; what is true is not counted.
ROWS: Final = 2 * ROWS_IN_ALL + NAMED + 1
FEED: Final = "ward"
# Who speaks for many, in X-Forwarded-For.
PROXY: Final = "127.0.0.9"
_WRONG: Final = "a-stranger-s-guess-at-the-token-00"
_ADDRESSES: Final = 10  # the last number of the first address


@dataclass(frozen=True, kw_only=True, slots=True)
class Aim:
    """What a flood is aimed at. `body` is a message of the destination's, `query` a query."""

    port: int
    destination: str
    token: str = field(repr=False)
    body: bytes = field(repr=False)
    query: bytes = field(repr=False)
    forwarded: bool = False


def _post(
    aim: Aim,
    body: bytes,
    *,
    token: str | None = None,
    path: str | None = None,
    method: str = "POST",
    media: str = "application/json",
    **headers: str,
) -> bytes:
    given = {
        "host": "receiver.test",
        "content-type": media,
        "content-length": str(len(body)),
        "verification-token": aim.token if token is None else token,
        **headers,
    }
    if aim.forwarded:
        given["x-forwarded-for"] = f"2001:db8:{uuid4().hex[:4]}:{uuid4().hex[:4]}::1"
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {path or f'/redox/{aim.destination}'} HTTP/1.1\r\n{head}\r\n".encode() + body


def _handshake(aim: Aim, token: str) -> bytes:
    return _post(aim, json.dumps({"verification-token": token, "challenge": str(uuid4())}).encode(), token=token)


def _renewed(body: bytes) -> bytes:
    """The message with another log id: a new one."""
    meta = json.loads(body)
    meta["Meta"]["Logs"] = [{"ID": str(uuid4()), "AttemptID": str(uuid4())}]
    return json.dumps(meta).encode()


_GUESSES: Final = "guesses at the token endpoint"
_MADE_UP: Final = "made-up sources"
_NEW: Final = "new messages"
# Name → a request of that flood, and the statuses that are right for it.
KINDS: Final[dict[str, tuple[Callable[[Aim], bytes], frozenset[int]]]] = {
    "wrong tokens": (lambda aim: _post(aim, aim.body, token=_WRONG), frozenset({401})),
    "wrong tokens, each from another IPv6 /64": (lambda aim: _post(aim, aim.body, token=_WRONG), frozenset({401})),
    "handshakes, wrong token": (lambda aim: _handshake(aim, _WRONG), frozenset({401})),
    "handshakes, right token": (lambda aim: _handshake(aim, aim.token), frozenset({200})),
    "repeats of one message": (lambda aim: _post(aim, aim.body), frozenset({200})),
    _MADE_UP: (lambda aim: _post(aim, aim.body.replace(SOURCE.encode(), str(uuid4()).encode())), frozenset({403})),
    "unknown destinations": (lambda aim: _post(aim, aim.body, path="/redox/nobody-registered-this"), frozenset({401})),
    "another method": (lambda aim: _post(aim, aim.body, method="PUT"), frozenset({405})),
    "what is no HTTP": (lambda _: b"GET /redox/lab HTTP/9.9\r\nbad\x00header\r\n\r\n", frozenset({400})),
    "queries that nobody answers": (lambda aim: _post(aim, _renewed(aim.query)), frozenset({501})),
    _GUESSES: (
        lambda aim: _post(
            aim,
            b"grant_type=client_credentials&client_id=redox&client_secret=" + uuid4().hex.encode(),
            path=f"/oauth/{aim.destination}/token",
            media="application/x-www-form-urlencoded",
        ),
        frozenset({401, 429}),
    ),
    _NEW: (lambda aim: _post(aim, _renewed(aim.body)), frozenset({200})),
}
_FORWARDED: Final = "wrong tokens, each from another IPv6 /64"
# What leaves no row in the audit, and what leaves one for each message that is kept.
_NO_ROWS: Final = frozenset({"another method", "what is no HTTP"})
_KEPT: Final = "queries that nobody answers"


@dataclass(kw_only=True)
class Outcome:
    """How a flood went. Times in seconds; `answers` by status, 0 for none; `rows` and `told` (sum of counts)."""

    kind: str
    seconds: float
    answers: Counter[int]
    feed: list[float]
    refused: int
    log_bytes: int
    rows: int = 0
    told: int = 0


# --- who floods: in processes of their own


def flood(kind: str, aim: Aim, number: int, seconds: float, limit: int) -> Counter[int]:
    """Send requests of that kind for so long, or so many, on several connections. Answers by status."""
    answers: Counter[int] = Counter()
    lock = threading.Lock()
    ends = time.monotonic() + seconds

    def run(place: int) -> None:
        address = PROXY if aim.forwarded else f"127.0.0.{_ADDRESSES + number * CONNECTIONS + place}"
        found: Counter[int] = Counter()
        with _Sender(aim.port, address) as sender:
            while time.monotonic() < ends and found.total() * CONNECTIONS < limit:
                found[sender.ask(KINDS[kind][0](aim))] += 1
        with lock:
            answers.update(found)

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 60)
    return answers


class _Sender:
    """A connection from that address, made anew when the other side has closed it."""

    def __init__(self, port: int, address: str) -> None:
        self._port, self._address = port, address
        self._socket: socket.socket | None = None

    def ask(self, request: bytes) -> int:
        """The status of the answer, 0 when there is none."""
        try:
            if self._socket is None:
                self._socket = socket.create_connection(
                    ("127.0.0.1", self._port), timeout=30, source_address=(self._address, 0)
                )
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered already
                self._socket.sendall(request)
            head, _, body = self._read(b"").partition(b"\r\n\r\n")
            fields = head.decode("latin-1").lower().split("\r\n")
            length = next((int(each.partition(":")[2]) for each in fields if each.startswith("content-length:")), 0)
            while len(body) < length:
                body = self._more(body)
            if "connection: close" in fields:
                self._close()
            return int(head.split()[1])
        except (OSError, ValueError, IndexError):
            self._close()
            return 0

    def _read(self, data: bytes) -> bytes:
        while b"\r\n\r\n" not in data:
            data = self._more(data)
        return data

    def _more(self, data: bytes) -> bytes:
        assert self._socket is not None
        if not (more := self._socket.recv(65536)):
            raise ConnectionResetError
        return data + more

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


# --- the machine that is flooded


class Flooded:
    """A machine with a destination for each of these kinds of flood, and one for the true feed."""

    def __init__(self, host: Machine, pool: ProcessPoolExecutor, kinds: Iterable[str]) -> None:
        self.host, self._pool = host, pool
        self._targets: dict[str, AttackTarget] = {}
        host.environment["RECEIVER_TRUSTED_PROXIES"] = PROXY
        host.up("--receivers", str(RECEIVERS))
        for name in (FEED, *map(_named, kinds)):
            token = host.register(name)
            self._targets[name] = AttackTarget(
                base_url=host.url, destination=name, source_id=SOURCE, token=token.read_text().strip()
            )
            if name == _named(_GUESSES):
                host.run(
                    "credential",
                    "add",
                    name,
                    "--kind",
                    "oauth",
                    "--client-id",
                    "redox",
                    "--secret-out",
                    str(host.root / "secret"),
                )
        self.engine: Engine = open_engine(host.cluster.url)
        self.port = urlsplit(host.url).port or 0
        until(lambda: all(target.redox().send(target.body(1)).accepted for target in self._targets.values()))

    def aim(self, kind: str) -> Aim:
        """What that flood is aimed at."""
        target = self._targets[_named(kind)]
        return Aim(
            port=self.port,
            destination=target.destination,
            token=target.token,
            body=target.body(1),
            query=target.redox().body("PatientSearch.Query"),
            forwarded=kind == _FORWARDED,
        )

    def begin(self, kind: str, seconds: float, *, limit: int = sys.maxsize) -> list[Future[Counter[int]]]:
        """Flood."""
        return [
            self._pool.submit(flood, kind, self.aim(kind), number, seconds, limit // PROCESSES)
            for number in range(PROCESSES)
        ]

    def run(self, kind: str | None, seconds: float) -> Outcome:
        """One flood, or none, and what the true feed saw of it."""
        logged = self.host.log.stat().st_size
        began = time.monotonic()
        floods = [] if kind is None else self.begin(kind, seconds)
        feed, refused = self._feed(began + seconds, stranger=kind == _MADE_UP)
        answers = sum((each.result() for each in floods), Counter[int]())
        return Outcome(
            kind=kind or "nothing",
            seconds=time.monotonic() - began,
            answers=answers,
            feed=feed,
            refused=refused,
            log_bytes=self.host.log.stat().st_size - logged,
        )

    def _feed(self, ends: float, *, stranger: bool) -> tuple[list[float], int]:
        """Send one message after another. How long each took, and how many were not accepted.

        `stranger`: now and then a message of a source that is there, and that nobody has registered.
        """
        redox = self._targets[FEED].redox()
        unknown = self._targets[_named(_MADE_UP)].redox(source_id=UNKNOWN) if stranger else redox
        took, refused = [], 0
        with redox.connect() as line:
            while time.monotonic() < ends:
                answer = redox.send(_renewed(redox.body("PatientAdmin.Arrival")), connection=line)
                took.append(answer.seconds)
                refused += not answer.accepted
                if stranger and len(took) % 25 == 1:
                    unknown.send(_renewed(unknown.body("PatientAdmin.Arrival")))
        return took, refused

    def count(self, outcome: Outcome) -> None:
        """Look what a flood has left in the audit, but for a row with each message that is kept."""
        where, values = "destination = :name", {"name": _named(outcome.kind)}
        if outcome.kind == "unknown destinations":
            where = "destination IS NULL AND reason = 'destination_unknown'"
        if outcome.kind == _KEPT:
            where += " AND action = 'query.answer'"
        row = self.rows(
            f"SELECT count(*) AS rows, coalesce(sum(count), 0) AS told FROM audit_events WHERE {where} AND "
            "actor NOT LIKE '%@%' AND outcome NOT IN ('accepted', 'unhandled')",
            **values,
        )[0]
        outcome.rows, outcome.told = row["rows"], row["told"]

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """The rows of a query."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def receivers(self) -> list[psutil.Process]:
        """gunicorn's workers."""
        return [
            each
            for each in psutil.Process(self.host.part("receiver")).children()
            if "gunicorn" in " ".join(each.cmdline())
        ]

    def level(self) -> dict[str, float]:
        """Megabytes, descriptors and threads of the receivers together, and connections to the database."""
        workers = self.receivers()
        sessions = self.rows("SELECT count(*) AS n FROM pg_stat_activity WHERE backend_type = 'client backend'")[0]["n"]
        return {
            "PSS, MB": sum(map(_pss, workers)) / 2**20,
            "descriptors": sum(each.num_fds() for each in workers),
            "threads": sum(each.num_threads() for each in workers),
            "connections to the database": sessions,
        }

    def close(self) -> None:
        """Done with."""
        self.engine.dispose()


# A source that is really there, among those that are made up.
UNKNOWN: Final = "3d2a6f04-0000-4000-8000-00000000abcd"


def _named(kind: str) -> str:
    """The destination of that flood."""
    return "-".join(kind.lower().replace(",", "").replace("/", "").split())


def _pss(process: psutil.Process) -> int:
    """Bytes of memory, what is shared being divided among those who share it."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


# --- what is measured


def floods(here: Flooded, seconds: float, kinds: Sequence[str], tell: Tell) -> tuple[list[Outcome], list[str]]:
    """Each flood, and what did not hold."""
    here.run(None, min(seconds, 5.0))  # everybody has warmed up
    outcomes = [here.run(None, seconds)]
    for kind in kinds:
        outcomes.append(here.run(kind, seconds))
        tell(f"{kind}: {_line(outcomes[-1])}")

    def counted() -> bool:
        for each in outcomes[1:]:
            here.count(each)
        return all(
            each.told >= each.answers.total() - each.answers[0] for each in outcomes[1:] if each.kind not in _NO_ROWS
        )

    with suppress(AssertionError):
        until(counted, 120)  # what is summed up is written a minute later at the latest
    wrong = [f"{each.kind}: {said}" for each in outcomes for said in _violations(each)]
    if _MADE_UP in kinds:
        listed = here.host.json("source", "list", _named(_MADE_UP), "--refused", "--limit", "20")
        found = [each for each in listed if each["source_id"] == UNKNOWN]
        if not found or found[0]["count"] < 2:
            wrong.append(f"{_MADE_UP}: the one that is there is not among the first of `source list --refused`")
    return outcomes, wrong


def _violations(outcome: Outcome) -> list[str]:
    said = []
    if outcome.refused:
        said.append(f"{outcome.refused} messages of the true feed were not accepted")
    if outcome.kind == "nothing":
        return said
    strange = set(outcome.answers) - KINDS[outcome.kind][1] - {0}
    said += [f"answered {status}, {outcome.answers[status]} times" for status in sorted(strange)]
    sent = outcome.answers.total() - outcome.answers[0]
    if outcome.kind not in _NO_ROWS and outcome.told < sent:
        said.append(f"{sent:,} were answered and {outcome.told:,} are in the audit")
    # A flood may begin late in one minute, and end early in another.
    if outcome.rows > RECEIVERS * ROWS * (outcome.seconds // 60 + 2):
        said.append(f"{outcome.rows:,} rows in the audit")
    return said


def burst(here: Flooded, count: int, tell: Tell) -> tuple[str, list[str]]:
    """So many messages, all accepted: a table of what the receivers take before, meanwhile and after."""
    table = "SELECT count(*) AS n FROM messages"
    before = here.rows(table)[0]["n"]
    levels = {"before": here.level()}
    began, answers = time.monotonic(), Counter[int]()
    for quarter in range(1, 5):
        answers += sum((each.result() for each in here.begin(_NEW, 3_600, limit=count // 4)), Counter[int]())
        levels[f"{quarter * count // 4:,}"] = here.level()
        tell(f"burst {levels[f'{quarter * count // 4:,}']}")
    seconds = time.monotonic() - began
    recorded = here.rows(table)[0]["n"] - before
    proved = here.host.json("audit", "verify")
    wrong = []
    if answers.keys() != {200} or answers[200] != recorded:
        wrong.append(f"burst: answered {dict(answers)}, and {recorded:,} recorded")
    columns = list(levels["before"])
    lines = [f"| {when} | {' | '.join(f'{level[each]:,.0f}' for each in columns)} |" for when, level in levels.items()]
    said = (
        f"{recorded:,} messages, all answered 200, in {seconds:.0f} s ({recorded / seconds:,.0f} a second, whose "
        f"senders shared the cores). `audit verify` then read {proved['rows']:,} rows, and all held.\n\n"
        f"| messages | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}\n" + "\n".join(lines)
    )
    return said, wrong


_TEXT: Final = """\
`up` with two receivers and the embedded PostgreSQL. For {seconds:g} s each, {connections} connections from as many
addresses send as fast as they can, while one true feed sends message after message; those who flood share the cores
with who is flooded. Every request that was answered is in the audit, as a row or in the count of one.

| flood of | requests a second | rows in the audit | bytes of log a minute | true feed: messages | p50, ms | p99, ms | \
not accepted |
|---|--:|--:|--:|--:|--:|--:|--:|
{rows}

The source that is there, and that nobody has registered, stands in `source list --refused` among the made-up ones.

### A burst

{burst}"""


def _line(outcome: Outcome) -> str:
    """The cells of one flood."""
    cuts = statistics.quantiles(outcome.feed, n=100) if len(outcome.feed) > 1 else [0.0] * 99
    return " | ".join(
        (
            f"{outcome.answers.total() / outcome.seconds:,.0f}",
            f"{outcome.rows:,}",
            f"{60 * outcome.log_bytes / outcome.seconds:,.0f}",
            f"{len(outcome.feed):,}",
            f"{1000 * cuts[49]:.0f}",
            f"{1000 * cuts[98]:.0f}",
            f"{outcome.refused}",
        )
    )


def measure(
    tell: Tell, *, seconds: float = SECONDS, messages: int = BURST, kinds: Sequence[str] = tuple(KINDS)[:-1]
) -> Section:
    """Every flood, and the burst; the chapter of the report."""
    with machine() as host, ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        here = Flooded(host, pool, [*kinds, *([_NEW] if messages else [])])
        try:
            outcomes, wrong = floods(here, seconds, kinds, tell)
            said, more = burst(here, messages, tell) if messages else ("", [])
        finally:
            here.close()
    rows = "\n".join(f"| {each.kind} | {_line(each)} |" for each in outcomes)
    return Section(
        title="Floods, and a burst",
        command=f"python -m tests.faults.floods --seconds {seconds:g} --burst {messages}",
        text=_TEXT.format(seconds=seconds, connections=PROCESSES * CONNECTIONS, rows=rows, burst=said),
        violations=tuple(wrong + more),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when nothing was violated."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.floods",
        description="Flood a receiver, and look whether the true feed goes on and nothing grows without end.",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N", help=f"each flood; default {SECONDS:g}")
    parser.add_argument("--burst", type=int, default=BURST, metavar="N", help=f"messages; default {BURST:,}")
    parser.add_argument("--only", action="append", choices=tuple(KINDS), metavar="KIND", help=", ".join(KINDS))
    options = parser.parse_args(arguments)
    section = measure(
        lambda line: print(line, flush=True),
        seconds=options.seconds,
        messages=options.burst,
        kinds=options.only or tuple(KINDS)[:-1],
    )
    print(f"\n{section.text}\n")
    for each in section.violations:
        print(f"VIOLATED {each}")
    return 1 if section.violations else 0


if __name__ == "__main__":
    sys.exit(main())
