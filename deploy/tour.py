"""The tour of ./deploy/quickstart: starts `up`, simulates Redox, shows the results, and serves until stopped.

Must not do anything that an operator could not type: every step is a command that is shown, except two requests of a
sender that is not Redox. Changes nothing outside of the data directory and the log next to it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

from receiver.simulator.attacks import AttackTarget, attack_cases

ROOT: Final = Path(__file__).resolve().parents[1]
COMMAND: Final = Path(sys.executable).parent / "redox-receiver"
DESTINATION: Final = "quickstart"
SOURCE: Final = "7ce6f387-c33c-417d-8682-81e83628cbd9"
KINDS: Final = (
    "PatientAdmin.NewPatient",
    "PatientAdmin.Arrival",
    "PatientAdmin.Discharge",
    "FHIR.PatientAdminCreated",
    "Order.New",
    "PatientSearch.Query",
)
REFUSED: Final = ("wrong token", "unknown source")

# A first start makes a database; a slow machine needs its time.
READY_SECONDS: Final = 180.0
DONE_SECONDS: Final = 60.0


class Failed(Exception):
    """A step of the tour failed."""


class Tour:
    """The steps of the tour, on one data directory."""

    def __init__(self, data_dir: Path, *, once: bool) -> None:
        self.data_dir, self.once = data_dir, once
        self.log = data_dir.with_name(f"{data_dir.name}.log")
        self.token_file = data_dir / f"{DESTINATION}.token"
        self.url = ""
        self.api = f"127.0.0.1:{8090 if _free(8090) else _free_port()}"
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RECEIVER_", "PLUGIN_", "PG")) and name != "DATABASE_URL"
        }
        self.environment = kept | {"RECEIVER_DATA_DIR": str(data_dir), "RECEIVER_HANDLERS": "receiver.testing.example"}

    @contextmanager
    def up(self) -> Iterator[subprocess.Popen[str]]:
        """Run `up` while the block runs. Raises Failed with the end of its log if it does not start."""
        binds = [f"127.0.0.1:{0 if self.once or not _free(port) else port}" for port in (8080, 8081)]
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["up", "--bind", binds[0], "--admin-bind", binds[1]]
        _say_command(arguments)
        with self.log.open("w") as log:
            process = subprocess.Popen(
                [COMMAND, *arguments], stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment
            )
        stopped = False

        def stop(*_: object) -> None:
            nonlocal stopped
            if not stopped:  # a second signal would kill what does not end at once
                stopped = True
                process.terminate()

        signal.signal(signal.SIGTERM, stop)
        try:
            assert process.stdout is not None
            ready_line = process.stdout.readline()
            if not ready_line.startswith("ready "):
                raise Failed("\n".join(["it did not start:", *self.log.read_text().splitlines()[-5:]]))
            self.url = ready_line.split()[1]
            click.echo(ready_line.rstrip())
            yield process
        except KeyboardInterrupt:  # which the whole terminal has had, `up` too
            stopped = True
        finally:
            stop()
            process.wait()

    def command(self, *arguments: str, expected: int = 0) -> None:
        """Run a command as an operator would. Raises Failed unless it exits with the `expected` status."""
        _say_command(arguments)
        if subprocess.run([COMMAND, *arguments], env=self.environment, check=False).returncode != expected:
            raise Failed(f"redox-receiver {arguments[0]} failed")

    def ask(self, *arguments: str) -> Any:
        """Return the document of a command with --json. Raises Failed."""
        done = subprocess.run(
            [COMMAND, *arguments, "--json"], env=self.environment, stdout=subprocess.PIPE, check=False
        )
        if done.returncode != 0:
            raise Failed(f"redox-receiver {shlex.join(arguments)} failed")
        return json.loads(done.stdout)

    def register(self) -> None:
        """Register a development destination with a token, a source and the example's handlers."""
        if not self.token_file.exists():
            self.command(
                "destination", "add", DESTINATION, "--environment", "development", "--token-out", str(self.token_file)
            )
        self.command("source", "add", DESTINATION, SOURCE, "--name", "Example Hospital")

    def speak(self) -> None:
        """Add an API key for Redox, with a signing key of our own, and let the destination reply with it."""
        known = bool(self.ask("outbound", "key", "list"))
        if not known:
            self.command("signing-key", "new")
        self.command(
            "outbound",
            "key",
            "add",
            DESTINATION,
            "--environment",
            "development",
            "--client-id",
            DESTINATION,
            "--source",
            SOURCE,
            "--base-url",
            f"http://{self.api}",
            *(["--replace"] if known else []),
        )
        self.command("destination", "set", DESTINATION, "--reply-with", DESTINATION)

    def refuse(self) -> None:
        """Send two requests that must be refused. Raises Failed if one is not."""
        target = AttackTarget(
            base_url=self.url, destination=DESTINATION, token=self.token_file.read_text().strip(), source_id=SOURCE
        )
        click.echo("\nSomebody who is not Redox, and a source that nobody has registered:")
        for each in attack_cases():
            if each.name in REFUSED:
                answer = each.send(target, random.randrange(1_000_000_000))  # noqa: S311 - no secret
                click.echo(f"  {each.name}: answered {answer.status}")
                if (wrong := each.check(answer)) is not None:
                    raise Failed(f"{each.name}: {wrong}")

    def play(self) -> None:
        """Simulate Redox: the handshake, messages, duplicates, a query, and the API to which a handler sends."""
        kinds = [part for kind in KINDS for part in ("--kind", kind)]
        self.command(
            "simulate",
            "--url",
            self.url,
            "--destination",
            DESTINATION,
            "--token-file",
            str(self.token_file),
            "--count",
            "2",
            "--api",
            self.api,
            *kinds,
        )

    def show(self) -> None:
        """Show the results, and verify the audit log. Raises Failed if a delivery fails or a message is missing."""
        until = time.monotonic() + DONE_SECONDS
        while self.ask("deliveries", "list", "--state", "pending"):
            if time.monotonic() > until:
                raise Failed(f"deliveries are pending after {DONE_SECONDS:g} s; the log is {self.log}")
        self.command("audit", "list", "--limit", "20")
        self.command("deliveries", "list", "--limit", "12")
        self.command("outbox", "list", "--limit", "5")
        self.command("status", expected=1)  # the source that was turned away is a finding
        self.command("audit", "verify")
        delivered = {each["state"] for each in self.ask("deliveries", "list", "--since", "10m")}
        seen = {(each["action"], each["outcome"]) for each in self.ask("audit", "list", "--since", "10m")}
        if delivered != {"succeeded"}:
            raise Failed(f"deliveries have not all succeeded, but: {', '.join(sorted(delivered)) or 'none was made'}")
        if {each["state"] for each in self.ask("outbox", "list", "--since", "10m")} != {"sent"}:
            raise Failed("what the handlers have sent has not all arrived: redox-receiver outbox list")
        if missing := {("query.answer", "answered"), ("message.receive", "accepted")} - seen:
            raise Failed(f"the audit lacks {missing}")

    def next_steps(self) -> None:
        """Print the commands to try next."""
        data_dir, receiver, token = (shlex.quote(str(path)) for path in (self.data_dir, COMMAND, self.token_file))
        for line in (
            "",
            f"It serves at {self.url}/redox/{DESTINATION} until you stop it (Ctrl-C). In another terminal:",
            "",
            f"  export RECEIVER_DATA_DIR={data_dir} RECEIVER_HANDLERS=receiver.testing.example",
            f"  {receiver} status",
            f"  {receiver} simulate --url {self.url} --destination {DESTINATION} --token-file {token}",
            f"  {receiver} messages list",
            f"  {receiver} --help",
            "",
            f"The log: {self.log}",
            "A handler of your own begins as a copy of receiver/testing/example.py; README.md goes on from here.",
        ):
            click.echo(line)


def _say_command(arguments: Sequence[str]) -> None:
    click.echo()
    click.secho(f"$ redox-receiver {shlex.join(arguments)}", bold=True)


def _free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def main() -> int:
    """Run the tour. Returns the exit status: 0 if every step succeeded."""
    parser = argparse.ArgumentParser(prog="deploy/quickstart", description="Show what redox-receiver does.")
    parser.add_argument("--once", action="store_true", help="stop when the tour is over")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=ROOT / ".data" / "quickstart",
        metavar="DIR",
        help="where the database and the keyring live (default: .data/quickstart in the tree)",
    )
    options = parser.parse_args()
    tour = Tour(options.data_dir.resolve(), once=options.once)
    try:
        with tour.up() as process:
            tour.register()
            tour.speak()
            tour.refuse()
            tour.play()
            tour.show()
            if not options.once:
                tour.next_steps()
                if process.wait() != 0:
                    raise Failed(f"it has ended by itself; the log is {tour.log}")
    except Failed as exc:
        click.secho(f"\nNot as it should be: {exc}", fg="red", err=True)
        return 1
    click.echo("\nstopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
