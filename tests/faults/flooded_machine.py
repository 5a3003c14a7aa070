"""The machine that is flooded: `up`, a destination for each kind of flood, and one for a valid feed."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil
from sqlalchemy import Engine, text

from receiver.database.engine import open_engine
from receiver.simulator.attacks import AttackTarget
from tests.faults.flood_senders import FORWARDED, GUESSES, KEPT, MADE_UP, PROXY, FloodTarget, flood, renewed
from tests.support.machine import SOURCE, Machine
from tests.support.waiting import until

RECEIVERS: Final = 2
PROCESSES: Final = 2  # that send floods
_FEED: Final = "ward"
# An existing source that is not registered for the destination, sent among made-up ones.
UNREGISTERED: Final = "3d2a6f04-0000-4000-8000-00000000abcd"


@dataclass(kw_only=True)
class FloodOutcome:
    """The result of a flood. Times in seconds.

    `responses`: counts by status, 0 without a response. `feed`: response times of the valid feed. `refused`: its
    messages that were not accepted. `rows`: audit rows. `counted`: the sum of their counts.
    """

    kind: str
    seconds: float
    responses: Counter[int]
    feed: list[float]
    refused: int
    log_bytes: int
    rows: int = 0
    counted: int = 0


class FloodedMachine:
    """A machine with a destination for each kind of flood, and one for the valid feed."""

    def __init__(self, host: Machine, pool: ProcessPoolExecutor, kinds: Iterable[str]) -> None:
        self.host, self._pool = host, pool
        self._targets: dict[str, AttackTarget] = {}
        host.environment["RECEIVER_TRUSTED_PROXIES"] = PROXY
        host.up("--receivers", str(RECEIVERS))
        for name in (_FEED, *map(destination_of, kinds)):
            token = host.register(name)
            self._targets[name] = AttackTarget(
                base_url=host.url, destination=name, source_id=SOURCE, token=token.read_text().strip()
            )
            if name == destination_of(GUESSES):
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

    def flood_target(self, kind: str) -> FloodTarget:
        """Return the target of that flood."""
        target = self._targets[destination_of(kind)]
        return FloodTarget(
            port=self.port,
            destination=target.destination,
            token=target.token,
            body=target.body(1),
            query=target.redox().body("PatientSearch.Query"),
            forwarded=kind == FORWARDED,
        )

    def begin(self, kind: str, seconds: float, *, limit: int = sys.maxsize) -> list[Future[Counter[int]]]:
        """Start a flood."""
        return [
            self._pool.submit(flood, kind, self.flood_target(kind), number, seconds, limit // PROCESSES)
            for number in range(PROCESSES)
        ]

    def run(self, kind: str | None, seconds: float) -> FloodOutcome:
        """Run one flood, or none, while the valid feed sends."""
        logged = self.host.log.stat().st_size
        began = time.monotonic()
        floods = [] if kind is None else self.begin(kind, seconds)
        feed, refused = self._feed(began + seconds, with_unregistered=kind == MADE_UP)
        responses = sum((each.result() for each in floods), Counter[int]())
        return FloodOutcome(
            kind=kind or "nothing",
            seconds=time.monotonic() - began,
            responses=responses,
            feed=feed,
            refused=refused,
            log_bytes=self.host.log.stat().st_size - logged,
        )

    def _feed(self, ends: float, *, with_unregistered: bool) -> tuple[list[float], int]:
        """Send one message after another. Returns the response times, and how many messages were not accepted.

        `with_unregistered`: now and then, also send a message of an existing source that is not registered.
        """
        redox = self._targets[_FEED].redox()
        unknown = self._targets[destination_of(MADE_UP)].redox(source_id=UNREGISTERED) if with_unregistered else redox
        took, refused = [], 0
        with redox.connect() as connection:
            while time.monotonic() < ends:
                answer = redox.send(renewed(redox.body("PatientAdmin.Arrival")), connection=connection)
                took.append(answer.seconds)
                refused += not answer.accepted
                if with_unregistered and len(took) % 25 == 1:
                    unknown.send(renewed(unknown.body("PatientAdmin.Arrival")))
        return took, refused

    def count(self, outcome: FloodOutcome) -> None:
        """Count what a flood has left in the audit log, except the rows of messages that are kept."""
        where, values = "destination = :name", {"name": destination_of(outcome.kind)}
        if outcome.kind == "unknown destinations":
            where = "destination IS NULL AND reason = 'destination_unknown'"
        if outcome.kind == KEPT:
            where += " AND action = 'query.answer'"
        row = self.rows(
            f"SELECT count(*) AS rows, coalesce(sum(count), 0) AS counted FROM audit_events WHERE {where} AND "
            "actor NOT LIKE '%@%' AND outcome NOT IN ('accepted', 'unhandled')",
            **values,
        )[0]
        outcome.rows, outcome.counted = row["rows"], row["counted"]

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def receivers(self) -> list[psutil.Process]:
        """Return gunicorn's workers."""
        return [
            each
            for each in psutil.Process(self.host.part("receiver")).children()
            if "gunicorn" in " ".join(each.cmdline())
        ]

    def level(self) -> dict[str, float]:
        """Return memory, descriptors and threads of all receivers together, and connections to the database."""
        workers = self.receivers()
        sessions = self.rows("SELECT count(*) AS n FROM pg_stat_activity WHERE backend_type = 'client backend'")[0]["n"]
        return {
            "PSS, MB": sum(map(_pss, workers)) / 2**20,
            "descriptors": sum(each.num_fds() for each in workers),
            "threads": sum(each.num_threads() for each in workers),
            "connections to the database": sessions,
        }

    def close(self) -> None:
        """Close the connections to the database."""
        self.engine.dispose()


def destination_of(kind: str) -> str:
    """Return the destination of that flood."""
    return "-".join(kind.lower().replace(",", "").replace("/", "").split())


def _pss(process: psutil.Process) -> int:
    """Return the proportional set size in bytes."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
