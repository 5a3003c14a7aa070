"""The cost of accepting a message behind the HTTP server: CPU from verdict to COMMIT, by number of concurrent messages.

Run it as `python -m tests.bench.accept`. One process verifies and records messages of 4 KB, so many at a time, in a
PostgreSQL that syncs every commit. 0 at a time means that it only verifies them. `--against TREE` also measures another
checkout of this project, in turn, on the same PostgreSQL. It checks only that accepted messages are stored, and no
speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from receiver import pipeline
from receiver.database.embedded.cluster import Cluster
from receiver.pipeline import Admitted
from receiver.protocol.message import Head
from receiver.server.process_tuning import freeze_heap
from receiver.storage.accept.ledger import MessageLedger
from receiver.storage.registry import loader
from tests.bench.bodies import Ids, of_size
from tests.bench.targets import ROOT, Database, Receiver, Workbench

QUOTA = 100_000_000
MESSAGES = 1_000
Figures = tuple[float, float, float]


class Accepting:
    """One process that verifies and records."""

    def __init__(self, receiver: Receiver) -> None:
        self._headers = {
            "verification-token": receiver.tokens["token"],
            "content-type": "application/json",
            "host": "127.0.0.1:8080",
            "content-length": "4096",
        }
        with receiver.engine.connect() as connection:
            self._registry = loader.load_registry(connection, receiver.keyring)
        self._ledger = MessageLedger(receiver.engine, receiver.keyring, quarantine_quota=QUOTA)
        self._ledger.start()
        freeze_heap()  # as servers do: a collection would be counted wherever it falls
        self._ids = iter(Ids())
        self._body = of_size("4 KB")
        self.stop = self._ledger.stop

    def run(self, together: int, messages: int) -> dict[str, float]:
        """Accept the messages. Returns the seconds of CPU of this process, and the seconds, for each message."""
        bodies = [self._body.with_id(each) for each in islice(self._ids, messages)]
        began, cpu = time.perf_counter(), time.process_time()
        if together:
            for at in range(0, messages, together):
                waiting = [self._ledger.accept(self._judge(body), batch=True) for body in bodies[at : at + together]]
                self._ledger.flush()
                for each in waiting:
                    each.result(60)
        else:
            for body in bodies:
                self._judge(body)
        return {"cpu": (time.process_time() - cpu) / messages, "seconds": (time.perf_counter() - began) / messages}

    def _judge(self, body: bytes) -> Admitted:
        now = datetime.now(UTC)
        head = Head(
            destination="token",
            method="POST",
            headers=self._headers,
            target="/redox/token",
            query="",
            peer="127.0.0.1",
            received_at=now,
        )
        accepted = pipeline.check_head(head, self._registry, now)
        assert isinstance(accepted, pipeline.HeadAccepted)
        verdict = pipeline.judge(accepted, body, now)
        assert isinstance(verdict, Admitted)
        return verdict


class Tree:
    """A checkout whose code accepts messages, in a process of its own."""

    def __init__(self, path: Path, workbench: Workbench, name: str) -> None:
        command = [sys.executable, "-P", "-m", "tests.bench.accept", "--serve", str(workbench.root), name]
        self._process = subprocess.Popen(
            command,
            cwd=path,
            env=os.environ | {"PYTHONPATH": str(path)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self._site = workbench
        if self._out.readline() != "ready\n":
            raise RuntimeError(f"the process of {path} ended")

    def run(self, together: int, messages: int) -> Figures:
        """Return CPU of the process, CPU of PostgreSQL and seconds, for each message."""
        database = self._site.database_cpu()
        print(together, messages, file=self._in, flush=True)
        found = json.loads(self._out.readline())
        return found["cpu"], (self._site.database_cpu() - database) / messages, found["seconds"]

    def end(self) -> None:
        """Stop the process, and wait."""
        self._in.close()
        self._process.wait(60)
        self._out.close()


@contextmanager
def _accepting(root: Path, name: str) -> Iterator[Accepting]:
    directory = root / name
    directory.mkdir()
    receiver = Receiver(Database(Cluster(root / "postgres"), name), directory)
    accepting = Accepting(receiver)
    try:
        yield accepting
    finally:
        accepting.stop()
        proof = receiver.proof()
        receiver.engine.dispose()
        if proof.first_bad is not None:
            raise RuntimeError(proof.first_bad)


def _serve(root: Path, name: str) -> None:
    with _accepting(root, name) as accepting:
        print("ready", flush=True)
        for line in sys.stdin:
            together, messages = map(int, line.split())
            print(json.dumps(accepting.run(together, messages)), flush=True)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.accept", description=__doc__)
    parser.add_argument("--against", type=Path, nargs="*", default=[], metavar="TREE", help="other checkouts")
    parser.add_argument("--together", default="0,1,8,32", help="how many come at once (0,1,8,32)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=MESSAGES, help="in each measurement")
    parser.add_argument("--serve", nargs=2, metavar=("ROOT", "NAME"), help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a line for each number and tree."""
    options: Any = _options().parse_args(arguments)
    if options.serve:
        _serve(Path(options.serve[0]), options.serve[1])
        return 0
    found: defaultdict[tuple[int, Path], list[Figures]] = defaultdict(list)
    paths = [ROOT, *(path.resolve() for path in options.against)]
    with Workbench() as workbench, ExitStack() as stack:
        trees = {}
        for number, path in enumerate(paths):
            trees[path] = Tree(path, workbench, f"tree_{number}")
            stack.callback(trees[path].end)
        for number in range(options.rounds + 1):
            for together in map(int, options.together.split(",")):
                for path in paths if number % 2 else reversed(paths):
                    figures = trees[path].run(together, options.messages)
                    if number:  # the first round only warms up
                        found[together, path].append(figures)
    print("at once  CPU µs  PostgreSQL's  µs until answered  tree")
    for (together, path), rounds in sorted(found.items(), key=lambda item: (item[0][0], paths.index(item[0][1]))):
        cpu, database, seconds = (statistics.median(column) * 1e6 for column in zip(*rounds, strict=True))
        print(f"{together:7}  {cpu:6.0f}  {database:12.0f}  {seconds * max(1, together):17.0f}  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
