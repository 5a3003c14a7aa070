"""A machine with `redox-receiver up` on it, as an operator would have it: real processes, the embedded PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from receiver.database.embedded.cluster import Cluster
from receiver.errors import ConfigurationError
from tests.support.postgres import open_directory

SOURCE = "5f3c1d9e-0000-4000-8000-000000000001"


class Machine:
    """A data directory, commands on it, and an `up` that may run on it."""

    def __init__(self, root: Path, python: str) -> None:
        self.root = root
        self.python = python
        self.data_dir = root / "data"
        self.environment = {"RECEIVER_DATA_DIR": str(self.data_dir)}
        self.log = root / "up.log"
        self.process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def cluster(self) -> Cluster:
        """The embedded PostgreSQL of this machine."""
        return Cluster(self.data_dir)

    def plug_in(self, module: str, code: str) -> None:
        """Write a module of handlers into the root, and have all processes started from now on load it."""
        (self.root / f"{module}.py").write_text(code)
        self.environment |= {"RECEIVER_HANDLERS": module, "PYTHONPATH": str(self.root)}

    def up(self, *options: str, bind: str = "127.0.0.1:0", no_terminal: bool = False) -> None:
        """Start `up` and wait for its `ready` line."""
        self.start("--bind", bind, "--admin-bind", "127.0.0.1:0", "--receivers", "1", *options, no_terminal=no_terminal)
        assert self.process is not None
        assert self.process.stdout is not None
        printed = self.process.stdout.readline()
        assert printed.startswith("ready http://127.0.0.1:"), f"{printed!r} {self.log.read_text()}"
        self.url = printed.split()[1]

    def start(self, *options: str, no_terminal: bool = False) -> None:
        """Start `up`, in a process group of its own as a shell does, without waiting for anything.

        `no_terminal`: in a session of its own, as a process manager does.
        """
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [self.python, "-P", "-m", "receiver", "up", *options],
                cwd=self.root,
                env=self._environment(),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=no_terminal,
                process_group=None if no_terminal else 0,
            )

    def ended(self) -> tuple[int, str]:
        """Wait until `up` has ended. Returns its exit status, and the rest of its stdout."""
        assert self.process is not None
        printed, _ = self.process.communicate(timeout=120)
        return self.process.returncode, printed

    def status(self) -> str:
        """Return what `status` prints when it shows an error (exit status 1)."""
        return self._run("status", status=1).stdout

    def run(self, *arguments: str, stdin: str | None = None, fails: bool = False) -> str:
        """Run a command. Returns its stdout, or its stderr if it `fails` (exit status 1)."""
        done = self._run(*arguments, stdin=stdin, status=1 if fails else 0)
        return done.stderr if fails else done.stdout

    def _run(self, *arguments: str, stdin: str | None = None, status: int) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self.python, "-P", "-m", "receiver", *arguments],
            cwd=self.root,
            env=self._environment(),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def json(self, *arguments: str, stdin: str | None = None) -> Any:
        """Run a command with `--json`."""
        return json.loads(self.run(*arguments, "--json", stdin=stdin))

    def findings(self) -> dict[str, dict[str, Any]]:
        """Return the findings of `status` by code. Of several with one code, the last."""
        return {each["code"]: each for each in self._status()["findings"]}

    def known_workers(self) -> list[dict[str, Any]]:
        """Return the workers that `status` shows."""
        found: list[dict[str, Any]] = self._status()["workers"]
        return found

    def _status(self) -> dict[str, Any]:
        done = subprocess.run(
            [self.python, "-P", "-m", "receiver", "status", "--json"],
            cwd=self.root,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        errors = any(each["severity"] == "error" for each in found["findings"])
        assert done.returncode == errors, done.stdout + done.stderr
        return found

    def register(self, destination: str, *options: str) -> Path:
        """Register a destination with a source. Returns the file with its token."""
        token = self.root / f"{destination}.token"
        self.run("destination", "add", destination, "--token-out", str(token), *options)
        self.run("source", "add", destination, SOURCE)
        return token

    def family(self) -> list[psutil.Process]:
        """Return all processes that `up` has started, and the database's."""
        assert self.process is not None
        postmaster = self.cluster.pid()
        return [
            *psutil.Process(self.process.pid).children(recursive=True),
            *([] if postmaster is None else [psutil.Process(postmaster)]),
        ]

    def part(self, name: str) -> int:
        """Return the process id of a child (`receiver`, `admin`, `worker-1`), from its last line in the log."""
        started = [line for line in self.lines() if line.get("event") == "up.child_started" and line["part"] == name]
        return int(started[-1]["child"])

    def parts(self) -> set[int]:
        """Return the process ids of all children, from their last lines in the log."""
        return {self.part(line["part"]) for line in self.lines() if line.get("event") == "up.child_started"}

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def _environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RECEIVER_", "PG")) and name != "DATABASE_URL"
        }
        return kept | self.environment

    def clear(self) -> None:
        """Kill what still runs, and remove the directory."""
        if self.process is not None and self.process.poll() is None:
            left = psutil.Process(self.process.pid).children(recursive=True)
            for each in (self.process, *left):
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            self.process.communicate()
            psutil.wait_procs(left, 30)
        with suppress(ConfigurationError):
            self.cluster.stop()
        shutil.rmtree(self.root)


@contextmanager
def machine(python: str = sys.executable) -> Iterator[Machine]:
    """Yield a machine that uses this interpreter, and remove everything of it afterwards."""
    made = Machine(open_directory(), python)
    try:
        yield made
    finally:
        made.clear()
