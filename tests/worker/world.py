"""A receiver without its endpoint: messages recorded by the real ledger, and workers as real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr
from sqlalchemy import Engine, text

from receiver.keyring import Keyring
from receiver.pipeline import Admitted, Receipt
from receiver.protocol.message import Head, Inbound, Verified
from receiver.protocol.reading import read
from receiver.protocol.registry import Destination
from receiver.settings import Settings
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.registry import loader
from receiver.storage.registry.changes import RegistryChanges
from receiver.worker import discovery
from receiver.worker.handler_process.ipc import LaneDone
from receiver.worker.handler_process.supervisor import HandlerSlot
from receiver.worker.lane_run import run_lane
from receiver.worker.leases import Leases
from tests.support.measuring import MEASURED
from tests.support.waiting import DEADLINE, until

PLUGIN = "tests.worker.plugins.scripted"
ROOT = Path(__file__).parents[2]
# Variables of this process that would change what the processes of a world do.
_FOREIGN = ("RECEIVER_", "PLUGIN_", "PROMETHEUS_")


@dataclass
class World:
    """One database with the destination `lab`, and operations on it."""

    url: str
    engine: Engine
    keyring: Keyring
    keyring_path: Path
    registration: RegistryChanges
    directory: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    count: int = 0

    @property
    def journal_path(self) -> Path:
        """The file in which handlers record what they do."""
        return self.directory / "journal"

    @property
    def log_path(self) -> Path:
        """The output of the workers."""
        return self.directory / "workers.log"

    def add_destination(self, name: str = "lab", environment: str = "staging") -> None:
        """Add a destination that accepts everything."""
        self.registration.add_destination(
            name,
            datetime.now(UTC),
            environment=environment,
            require=["token"],
            sources_policy="any",
            on_unknown_source="reject",
            test_messages="accept",
            reply_with=None,
            token="a token of twenty-four characters",
        )

    def enable(self, handler: str, destination: str = "lab") -> None:
        """Enable a handler of the test plugin."""
        spec = discovery.load_handler(handler, [PLUGIN]).spec
        self.registration.enable_handler(destination, spec, datetime.now(UTC))

    def destination(self, name: str = "lab") -> Destination:
        """Return the destination as it is registered now."""
        with self.engine.connect() as connection:
            return loader.load_registry(connection, self.keyring).destinations[name]

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a process of this world."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        return (
            kept
            | MEASURED
            | {
                "PYTHONPATH": str(ROOT),
                "DATABASE_URL": self.url,
                "RECEIVER_DATA_DIR": str(self.directory),
                "RECEIVER_KEYRING": str(self.keyring_path),
                "RECEIVER_HANDLERS": PLUGIN,
                "RECEIVER_LEASE": "5",
                "JOURNAL": str(self.journal_path),
                **more,
            }
        )

    @contextmanager
    def ledger(self, on_commit: Callable[[Any], None] = lambda _lanes: None) -> Iterator[MessageLedger]:
        """Run the ledger."""
        ledger = MessageLedger(self.engine, self.keyring, quarantine_quota=1 << 30, on_commit=on_commit)
        ledger.start()
        try:
            yield ledger
        finally:
            ledger.stop()

    def admitted(
        self,
        do: str = "nothing",
        *,
        source: str = "s1",
        patient: str = "p1",
        destination: str = "lab",
        kind: str = "PatientAdmin.Arrival",
        **more: Any,
    ) -> Admitted:
        """Return the next message, verified and parsed."""
        self.count += 1
        model, _, event = kind.partition(".")
        body = json.dumps(
            {
                "Meta": {
                    "DataModel": model,
                    "EventType": event,
                    "Source": {"ID": source},
                    "Logs": [{"ID": f"log-{self.count}"}],
                },
                "Patient": {"Identifiers": [{"ID": patient, "IDType": "MR"}]},
                "N": self.count,
                "Do": do,
                **more,
            }
        ).encode()
        head = Head(
            destination=destination,
            method="POST",
            headers={},
            target=f"/redox/{destination}",
            query="",
            peer="127.0.0.1",
            received_at=datetime.now(UTC),
        )
        message = read(body)
        return Admitted(
            inbound=Inbound(head=head, body=body),
            destination=self.destination(destination),
            message=message,
            verified=Verified(credentials=(1,), kinds=frozenset({"token"})),
            quarantine=None,
            query=message.kind if message.query else None,
        )

    def send(self, *deeds: str, **more: Any) -> list[Receipt]:
        """Record messages with these actions, one after another."""
        with self.ledger() as ledger:
            return [ledger.accept(self.admitted(do, **more)).result(30) for do in deeds]

    def hand(self, *deeds: str, **more: Any) -> Sent:
        """Record messages. Returns their deliveries only."""
        first = self.count + 1
        return Sent(world=self, receipts=self.send(*deeds, **more), first=first)

    def settings(self, **more: Any) -> Settings:
        """Return the settings of a process of this world."""
        given = {
            "database_url": SecretStr(self.url),
            "data_dir": self.directory,
            "keyring": self.keyring_path,
            "handlers": (PLUGIN,),
            "lease": 5.0,
            **more,
        }
        return Settings(**given)

    def stay(
        self, slot: HandlerSlot, lane: str, *, leave_after: float = 30.0, lease: float = 30.0, up_to: int | None = None
    ) -> LaneDone | None:
        """Run a lane in a handler process, as a worker or a request does."""
        handler, destination, _ = lane.split("/", 2)
        subscription = next(each for each in self.destination(destination).subscriptions if each.handler == handler)
        return run_lane(
            slot, Leases(self.engine, "tester"), lane, subscription, lease=lease, leave_after=leave_after, up_to=up_to
        )

    def start_worker(self, **more: str) -> subprocess.Popen[bytes]:
        """Start a worker process, which ends with the test."""
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "receiver", "worker"],
                env=self.environment(**more),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        """End every process that was started, including handler processes."""
        for process in self.processes:
            if process.poll() is None:
                try:
                    children = psutil.Process(process.pid).children(recursive=True)
                except psutil.NoSuchProcess:
                    children = []
                for each in children:
                    _kill(each.pid)
                _kill(process.pid)
                process.wait(30)

    def rows(self, query: str, **values: Any) -> list[dict[str, Any]]:
        """Return the rows of a query."""
        with self.engine.connect() as connection:
            return [dict(row) for row in connection.execute(text(query), values).mappings()]

    def execute(self, statement: str, **values: Any) -> None:
        """Execute a statement."""
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)

    def hold_time(self) -> None:
        """Prolong every pause, so that it does not end on a slow machine."""
        self.execute("UPDATE lanes SET ready_at = now() + interval '1 day' WHERE state = 'waiting'")

    def let_time_pass(self) -> None:
        """End every pause now."""
        self.execute("UPDATE lanes SET ready_at = now() WHERE ready_at > now()")
        self.execute("UPDATE deliveries SET ready_at = now() WHERE ready_at > now()")

    def deliveries(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        return self.rows("SELECT * FROM deliveries ORDER BY id")

    def states(self) -> list[str]:
        """The state of each, oldest first."""
        return [each["state"] for each in self.deliveries()]

    def until_states(self, *states: str, seconds: float = DEADLINE) -> None:
        """Wait until the deliveries are in these states."""
        until(lambda: self.states() == list(states), f"{states}, have {self.states()}", seconds=seconds)

    def until_done(self, seconds: float = DEADLINE) -> None:
        """Wait until nothing is pending."""
        until(lambda: not self.rows("SELECT FROM deliveries WHERE state = 'pending' LIMIT 1"), "done", seconds=seconds)

    def attempts(self) -> list[dict[str, Any]]:
        """All attempts, in the order in which they ended."""
        return self.rows("SELECT * FROM delivery_attempts ORDER BY id")

    def journal(self, phase: str | None = None) -> list[dict[str, Any]]:
        """What the handlers wrote down."""
        if not self.journal_path.exists():
            return []
        lines = [json.loads(line) for line in self.journal_path.read_text().splitlines()]
        return [line for line in lines if phase in (None, line["phase"])]

    def until_begun(self, n: int, times: int = 1) -> dict[str, Any]:
        """Wait until the handler of message `n` has begun for that many times; the last such line."""

        def begun() -> list[dict[str, Any]]:
            return [line for line in self.journal("begin") if line["n"] == n]

        until(lambda: len(begun()) >= times, f"message {n} begun {times} times")
        return begun()[times - 1]

    def flag(self, name: str) -> Path:
        """Return a file that a handler can wait for."""
        return self.directory / name


@dataclass
class Sent:
    """Messages, the first of which has the number `first`, and their deliveries."""

    world: World
    receipts: list[Receipt]
    first: int

    @property
    def numbers(self) -> list[int]:
        """The numbers of these messages in the journal."""
        return list(range(self.first, self.first + len(self.receipts)))

    def deliveries(self) -> list[dict[str, Any]]:
        """Theirs, oldest first."""
        return self.world.rows(
            "SELECT * FROM deliveries WHERE message_id = ANY(:ids) ORDER BY id",
            ids=[receipt.message_id for receipt in self.receipts],
        )

    @property
    def lane(self) -> str:
        """The lane of the first message."""
        return str(self.deliveries()[0]["lane"])

    def states(self) -> list[str]:
        """The state of each."""
        return [each["state"] for each in self.deliveries()]

    def until_states(self, *states: str, seconds: float = DEADLINE) -> None:
        """Wait until they are in these states."""
        until(lambda: self.states() == list(states), f"{states}, have {self.states()}", seconds=seconds)

    def until_done(self, seconds: float = DEADLINE) -> None:
        """Wait until none is pending."""
        until(lambda: "pending" not in self.states(), f"done, have {self.states()}", seconds=seconds)

    def attempts(self) -> list[dict[str, Any]]:
        """Theirs, in the order in which they ended."""
        return self.world.rows(
            "SELECT a.* FROM delivery_attempts a JOIN deliveries d ON d.id = a.delivery_id "
            "WHERE d.message_id = ANY(:ids) ORDER BY a.id",
            ids=[receipt.message_id for receipt in self.receipts],
        )

    def outcomes(self) -> list[str]:
        """Return the outcome of each attempt."""
        return [each["outcome"] for each in self.attempts()]

    def journal(self, phase: str | None = None) -> list[dict[str, Any]]:
        """What was written down of them."""
        return [line for line in self.world.journal(phase) if line["n"] in self.numbers]

    def ran(self) -> list[int]:
        """Return the numbers of the messages whose handler began, in that order, counted from 1."""
        return [line["n"] - self.first + 1 for line in self.journal("begin")]

    def until_begun(self, which: int = 1, times: int = 1) -> dict[str, Any]:
        """Wait until the handler of the message `which` (counted from 1) has begun that often; that line."""
        return self.world.until_begun(self.first + which - 1, times)


def handler_processes(pid: int) -> list[psutil.Process]:
    """Return the handler processes of a worker, and the processes that they have started."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
