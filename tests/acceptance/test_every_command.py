"""Every command runs on a machine that serves.

What each command does exactly is tested in tests/cli. Here it runs against real processes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest

from receiver.simulator.api import FakeRedoxApi
from receiver.simulator.fake_redox import FakeRedox
from tests.cli.conftest import Commands
from tests.cli.test_commands import EVERY
from tests.support.machine import SOURCE, Machine, machine
from tests.support.waiting import until

PLUGIN = """
from receiver.handlers import handler

@handler("PatientAdmin.Arrival", name="fails", max_attempts=1)
def fails(message, context):
    message.data["Nothing of this name"]

@handler("PatientAdmin.Discharge", name="holds", max_attempts=1, on_failure="hold")
def holds(message, context):
    message.data["Nothing of this name"]
"""
# These run already: `up` is this machine, and the others are its parts.
RUNNING = {"up", "serve", "admin", "worker"}
WHY = ("--reason", "an operator's day")


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    """A machine with two handlers that fail."""
    with machine() as made:
        made.plug_in("broken", PLUGIN)
        made.up("--workers", "1")
        yield made


class Day:
    """Runs commands, and records which."""

    def __init__(self, at: Machine) -> None:
        self.at = at
        self.done: set[str] = set(RUNNING)

    def __call__(self, *words: str, stdin: str | None = None, fails: bool = False) -> str:
        """Run a command in this process. Returns its stdout, or its stderr if it `fails`."""
        self.done.add(next(name for name in map(" ".join, EVERY) if f"{' '.join(words)} ".startswith(f"{name} ")))
        return Commands().fails(*words) if fails else Commands()(*words, stdin=stdin).stdout

    def json(self, *words: str) -> Any:
        """Run a command with --json."""
        return json.loads(self(*words, "--json"))


def test_a_day(running: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first destination to the backup, every command runs."""
    monkeypatch.syspath_prepend(str(running.root))
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    run, token = Day(running), running.root / "lab.token"
    run("status")
    run("check")
    registered(run)
    redox = FakeRedox(running.url, "lab", token.read_text().strip(), source_id=SOURCE)
    until(lambda: len(bindings(run)) == 2)
    worked(run, redox)
    quarantined(run, redox)
    spoken(run)
    kept(run)
    compared(run)
    run(
        "simulate",
        "--destination",
        "lab",
        "--token-file",
        str(token),
        "--url",
        running.url,
        "--source",
        SOURCE,
        "--kind",
        "Results.New",
    )
    assert {" ".join(path) for path in EVERY} - run.done == set()


def registered(run: Day) -> None:
    """Register destinations, credentials and sources, by command and by file."""
    root = run.at.root
    run("destination", "add", "lab", "--token-out", str(root / "lab.token"))
    run("destination", "set", "lab", "--test-messages", "accept")
    run("destination", "show", "lab")
    run("destination", "disable", "lab")
    run("destination", "enable", "lab")
    run("destination", "list")
    added = run.json("credential", "add", "lab", "--kind", "token")
    run("credential", "list")
    run("credential", "set", str(added["id"]), "--expires", "90d")
    run("credential", "revoke", str(added["id"]))
    run("source", "add", "lab", SOURCE)
    run("source", "disable", "lab", SOURCE)
    run("source", "add", "lab", SOURCE)
    run("source", "list")
    (root / "registry.toml").write_text(
        '[destinations.other]\nenvironment = "staging"\ncredentials = [{ kind = "token", file = "lab.token" }]\n'
    )
    run("registry", "export")
    run("registry", "apply", str(root / "registry.toml"))


def bindings(run: Day) -> list[Any]:
    """Return the handlers that the worker has bound to the destination."""
    return [each for each in run.json("handlers", "list") if each.get("destination") == "lab"]


def worked(run: Day, redox: FakeRedox) -> None:
    """Run the commands of handlers and of failed deliveries."""
    run("handlers", "check")
    for verb in ("disable", "enable"):
        run("handlers", verb, "fails", "--destination", "lab")
    for verb in ("pause", "resume"):
        run("handlers", verb, "fails")
    seeds = itertools.count()

    def dead() -> list[Any]:
        # The receiver sees an enabled handler within a second. Messages accepted before that are not for `fails`.
        redox.send(redox.body("PatientAdmin.Arrival", seed=next(seeds)))
        return list(run.json("deliveries", "list", "--state", "dead"))

    found = until(dead)
    assert len({each["message_id"] for each in found}) == len(found)
    one = found[0]
    until(lambda: redox.send(redox.body("PatientAdmin.Discharge")).status == 200)
    until(lambda: held(run))
    run("deliveries", "show", str(one["id"]))
    run("messages", "show", str(one["message_id"]))
    run("messages", "replay", str(one["message_id"]), *WHY, "--dry-run")
    run("deliveries", "retry", str(one["id"]), *WHY)
    (lane,) = held(run)
    run("lanes", "release", lane["lane"], *WHY)
    until(lambda: held(run) != [])  # it has run again, and failed
    run("deliveries", "skip", str(lane["head"]), *WHY)
    assert held(run) == []


def compared(run: Day) -> None:
    """Run `reconcile` with a log that names the recorded messages."""
    log = run.at.root / "log.csv"
    log.write_text("Log ID\n" + "".join(f"{each['log_id']}\n" for each in run.json("messages", "list")))
    run("reconcile", "--from", str(log), "--destination", "lab")


def held(run: Day) -> list[Any]:
    """Return the lanes that wait for an operator."""
    return [each for each in run.json("lanes", "list") if each["state"] == "held"]


def quarantined(run: Day, redox: FakeRedox) -> None:
    """Release one quarantined message, and discard another."""
    run("destination", "set", "lab", "--test-messages", "quarantine")
    seeds = iter(range(100, 200))

    def waiting() -> list[Any]:
        redox.send(redox.body("Results.New", seed=next(seeds)))
        return list(run.json("messages", "list", "--state", "quarantined"))

    until(lambda: len(waiting()) >= 2)
    run("destination", "set", "lab", "--test-messages", "accept")
    one, other, *_ = run.json("messages", "list", "--state", "quarantined")
    run("messages", "release", str(one["id"]), *WHY)
    run("messages", "discard", str(other["id"]), *WHY)


def spoken(run: Day) -> None:
    """Run the commands of API keys and of calls to Redox. The outbox is empty."""
    root = run.at.root
    first = run.json("signing-key", "new")["kid"]
    run("signing-key", "rotate")
    run("signing-key", "retire", first)
    run("signing-key", "list")
    with FakeRedoxApi() as api:
        api.register_oauth("client", json.loads(run("signing-key", "jwks")))
        run(
            "outbound",
            "key",
            "add",
            "lab",
            "--environment",
            "development",
            "--client-id",
            "client",
            "--source",
            SOURCE,
            "--base-url",
            api.base_url,
        )
        run("outbound", "key", "list")
        run("outbound", "token")
        for verb, kind in (("send", "PatientAdmin.Arrival"), ("query", "PatientSearch.Query")):
            model, event = kind.split(".")
            asked = root / f"{verb}.json"
            asked.write_text(
                json.dumps({"Meta": {"DataModel": model, "EventType": event, "Destinations": [{"ID": SOURCE}]}})
            )
            run("outbound", verb, str(asked), "--out", str(root / f"{verb}.answer"), *WHY)
        search = root / "search.json"
        search.write_text(json.dumps({"family": "Example"}))
        run(
            "outbound",
            "fhir",
            str(search),
            "--to",
            "somewhere",
            "--resource",
            "Patient",
            "--search",
            "--out",
            str(root / "fhir.answer"),
            *WHY,
        )
    kept = run.json("outbox", "list")
    run("outbox", "show", str(kept[0]["id"]))
    run("outbox", "retry", "--state", "held", *WHY)


def kept(run: Day) -> None:
    """Run the commands of the audit, the keyring and backups."""
    run("audit", "list")
    run("audit", "verify")
    run("audit", "review", "--sign-off", *WHY)
    run("audit", "export", "--format", "fhir", "--out", str(run.at.root / "audit.ndjson"))
    run("audit", "report", "--patient", *WHY, stdin="4711\nMR\n")
    proof, public, checkpoint = (str(run.at.root / name) for name in ("row.proof", "seal.pub", "audit.checkpoint"))
    run("audit", "checkpoint", "--out", checkpoint)
    run("audit", "verify", "--checkpoint", checkpoint)
    run("audit", "prove", "1", "--out", proof)
    (run.at.root / "seal.pub").write_text(run("keys", "public"))
    run("audit", "check-proof", proof, "--public-key", public)
    run("keys", "list")
    old = next(each["id"] for each in run.json("keys", "list") if each["purpose"] == "session")
    new = run.json("keys", "new", "session")["id"]
    run("keys", "activate", new)
    run("keys", "count")
    assert "Restart them first" in run("keys", "retire", old, fails=True)
    assert "keyring" in run("keys", "init", fails=True)
    for verb in ("current", "check", "upgrade"):
        run("db", verb)
    run("deliveries", "resume", *WHY)
    run("db", "backup", str(run.at.root / "backup"))
    assert "up` runs on this data directory" in run("db", "restore", str(run.at.root / "backup"), fails=True)
