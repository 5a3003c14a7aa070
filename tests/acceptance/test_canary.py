"""No secret and no patient's data leaves the places that are made for them, on any path.

A token, a signing secret, the keys and a patient go through everything that can succeed or fail. Then everything that
can be read is searched: tables, files (PostgreSQL's too), logs, processes, answers, and the output of commands.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psycopg
import pytest
from sqlalchemy import make_url

from receiver import keyring as keyrings
from receiver.samples import sample
from receiver.simulator.fake_redox import FakeRedox
from receiver.simulator.http_connection import HttpReply
from receiver.simulator.signer import Signer
from tests.faults import leaky
from tests.faults.canary import Canaries
from tests.faults.site import ROOT
from tests.support.machine import SOURCE, Machine
from tests.support.postgres import open_directory
from tests.support.waiting import until

FAMILY = "Quibbleworthington"
SIGNING_SECRET = "a-signing-secret-that-nobody-else-has"
STRANGER = "what-a-stranger-presents-instead-of-it"


# Starting a process takes longer than most commands.
CLERK = """
import json, sys
from receiver.cli import main
for arguments in json.load(sys.stdin):
    print("$", *arguments[:2], flush=True)
    try:
        main(arguments)
    except SystemExit as exc:
        print("exit status", exc.code, flush=True)
"""


class Clerk(Machine):
    """A machine whose operator runs one command after another."""

    def commands(self, *several: Sequence[str]) -> list[tuple[str, str]]:
        """Run commands one after another in one process. Returns each command and all its output."""
        done = subprocess.run(
            [self.python, "-P", "-c", CLERK],
            cwd=self.root,
            env=self._environment(),
            input=json.dumps(several),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=120,
        )
        parts = re.split(r"^\$ ", done.stdout, flags=re.MULTILINE)[1:]
        printed = [(f"`{part.splitlines()[0]}`", part) for part in parts]
        assert len(printed) == len(several)
        return printed


@dataclass
class Driven:
    """A machine on which all of these paths were taken."""

    machine: Clerk
    token: str
    outputs: list[tuple[str, str | bytes]] = field(default_factory=list)
    statuses: dict[str, int | None] = field(default_factory=dict)
    admin: str = ""

    def answered(self, what: str, answer: HttpReply, *, discloses: bool = False) -> None:
        """Keep an answer, unless it discloses a body on request."""
        self.statuses[what] = answer.status
        if not discloses:
            self.outputs.append((f"the answer to {what}", answer.body + repr(dict(answer.headers)).encode()))

    def ran(self, *several: Sequence[str]) -> None:
        """Run commands, which must all succeed, and keep their output."""
        printed = self.machine.commands(*several)
        assert all(text.endswith("exit status 0\n") for _, text in printed), printed
        self.outputs += printed

    @property
    def url(self) -> str:
        """The database URL for psycopg."""
        return make_url(self.machine.cluster.url).set(drivername="postgresql").render_as_string()


PATIENT = replace(sample.person(7, family=FAMILY), mrn="QW-MR-77310044", ssn="QW-SSN-990011")


@pytest.fixture(scope="module")
def driven() -> Iterator[Driven]:
    """Take every path once. The tests search what is left."""
    made = Clerk(open_directory(), sys.executable)
    try:
        made.environment |= {
            "RECEIVER_HANDLERS": leaky.__name__,
            "PYTHONPATH": str(ROOT),
            "RECEIVER_MAX_BODY": "200000",
            "RECEIVER_LOG_LEVEL": "debug",
            "TMPDIR": str(made.root),
            "HOME": str(made.root),
        }
        made.up("--workers", "1")
        token = made.register("lab").read_text().strip()
        made.register("ward", "--require", "hmac+token")
        secret = made.root / "signing.secret"
        secret.write_text(SIGNING_SECRET)
        made.run("credential", "add", "ward", "--kind", "hmac", "--secret-file", str(secret))
        found = Driven(machine=made, token=token)
        found.admin = next(
            line["bind"] for line in made.lines() if line["event"] == "up.ready" and line["part"] == "admin"
        )
        drive(found)
        yield found
    finally:
        made.clear()


def drive(at: Driven) -> None:
    """Take all paths."""
    with psycopg.connect(at.url, autocommit=True) as connection:
        connection.execute(leaky.TABLE)
        redox = FakeRedox(at.machine.url, "lab", at.token, source_id=SOURCE)
        wait_for_handlers(at, redox)
        accepted(at, redox)
        refused(at, redox)
        malformed(at)
        kept_apart(at, redox)
        queries(at, redox)
        database_errors(at, redox, connection)
    until(lambda: not rows(at, "SELECT FROM deliveries WHERE state = 'pending' AND NOT inline LIMIT 1"))
    until(lambda: not rows(at, "SELECT FROM messages WHERE patients_indexed_at IS NULL AND kind IS NOT NULL LIMIT 1"))
    commands(at)


def rows(at: Driven, query: str) -> list[Any]:
    """Return the rows of a query."""
    with psycopg.connect(at.url) as connection:
        return connection.execute(query).fetchall()


def body(redox: FakeRedox, kind: str, seed: int) -> bytes:
    """Return a message about the patient."""
    return redox.body(kind, seed=seed, patient=PATIENT)


def wait_for_handlers(at: Driven, redox: FakeRedox) -> None:
    """Wait until handlers get new messages, and queries are answered."""
    bound = len([name for name in vars(leaky).values() if hasattr(name, "__redox_receiver__")])
    until(lambda: len(rows(at, "SELECT FROM subscriptions")) == 2 * bound)
    until(lambda: redox.send(redox.body("PatientSearch.LocationQuery")).status == 200)


def accepted(at: Driven, redox: FakeRedox) -> None:
    """Send messages that are accepted. Most of their deliveries die."""
    arrival = body(redox, "PatientAdmin.Arrival", 1)
    at.answered("a message", redox.send(arrival))
    at.answered("the same again", redox.send(arrival))
    at.answered("a notification", redox.send(body(redox, "FHIR.PatientAdminArrived", 1)))
    at.answered("a kind that nobody asked for", redox.send(body(redox, "Results.New", 1)))
    at.answered("a handler that fails within the request", redox.send(body(redox, "PatientAdmin.Transfer", 1)))
    ward = FakeRedox(
        at.machine.url,
        "ward",
        (at.machine.root / "ward.token").read_text().strip(),
        source_id=SOURCE,
        signer=Signer(secret=SIGNING_SECRET.encode()),
    )
    at.answered("a signed message", ward.send(body(redox, "PatientAdmin.Arrival", 2)))
    at.answered("a handshake", redox.handshake_post().answer)
    at.answered("a handshake by GET", redox.handshake_get().answer)


def refused(at: Driven, redox: FakeRedox) -> None:
    """Send requests that are refused, each with the patient and a secret."""
    arrival = body(redox, "PatientAdmin.Arrival", 3)
    stranger = FakeRedox(at.machine.url, "lab", STRANGER, source_id=SOURCE)
    at.answered("a wrong token", stranger.send(arrival))
    at.answered("a wrong token's handshake", stranger.handshake_post().answer)
    at.answered("a wrong token's handshake by GET", stranger.handshake_get().answer)
    at.answered("a wrong Bearer", redox.send(arrival, headers={"authorization": f"Bearer {STRANGER}"}))
    at.answered("two tokens", redox.send(arrival, headers={"verification-token": f"{at.token},{STRANGER}"}))
    at.answered("no signature", FakeRedox(at.machine.url, "ward", at.token, source_id=SOURCE).send(arrival))
    at.answered(
        "a token in the place of a name", FakeRedox(at.machine.url, at.token, at.token, source_id=SOURCE).send(arrival)
    )
    at.answered(
        "a patient in the place of a name", FakeRedox(at.machine.url, FAMILY, at.token, source_id=SOURCE).send(arrival)
    )
    for what, source in (("an unknown source", f"{PATIENT.given} {FAMILY}"), ("no source", None)):
        message = json.loads(arrival)
        message["Meta"]["Source"] = {"ID": source, "Name": FAMILY}
        at.answered(what, redox.send(message))
    at.answered("a body that is too large", redox.send(arrival + b" " * 300_000))


def malformed(at: Driven) -> None:
    """Send malformed and incomplete requests."""
    name = f"{PATIENT.given}%20{FAMILY}"
    host, port = at.machine.url.removeprefix("http://").split(":")
    head = f"Host: x\r\nVerification-Token: {at.token}\r\nContent-Type: application/json\r\n"
    for what, request in {
        "a token in a query": f"POST /redox/lab?verification-token={at.token}&patient={name} HTTP/1.1\r\nHost: x\r\n"
        "Content-Length: 0\r\n\r\n",
        "an invalid path": f"GET /{name}/{at.token} HTTP/1.1\r\nHost: x\r\n\r\n",
        "an invalid method": f"{FAMILY} /redox/lab HTTP/1.1\r\nHost: x\r\n\r\n",
        "an invalid version": f"GET /redox/lab?verification-token={at.token} HTTP/{FAMILY}\r\nHost: x\r\n\r\n",
        "an invalid header": f"GET /redox/lab HTTP/1.1\r\nHost: x\r\n{FAMILY} {at.token}\r\n\r\n",
        "a header with a NUL": f"GET /redox/lab HTTP/1.1\r\nHost: x\r\nVerification-Token: {at.token}\0\r\n\r\n",
        "a header that is too large": f"GET /redox/lab HTTP/1.1\r\nHost: x\r\nX: {FAMILY}{at.token * 400}\r\n\r\n",
        "two lengths": f"POST /redox/lab HTTP/1.1\r\n{head}Content-Length: 5\r\nContent-Length: {FAMILY}\r\n\r\n",
        "an invalid chunk": f"POST /redox/lab HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n"
        f"{FAMILY}\r\n{at.token}\r\n",
        "a body that ends early": f"POST /redox/lab HTTP/1.1\r\n{head}Content-Length: 1000\r\n\r\n"
        f'{{"Patient": "{FAMILY}"',
    }.items():
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(request.encode())
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        status = re.match(rb"HTTP/1.1 (\d+)", answer)
        at.statuses[what] = int(status[1]) if status else None
        at.outputs.append((f"the answer to {what}", answer))


def kept_apart(at: Driven, redox: FakeRedox) -> None:
    """Send authentic requests that are quarantined."""
    arrival = body(redox, "PatientAdmin.Arrival", 4)
    other = json.loads(arrival)
    other["Meta"]["DataModel"] = f"{PATIENT.given}, {FAMILY}"
    for what, content in {
        "half a message": arrival[: len(arrival) // 2],
        "text": f"no bed for {FAMILY}".encode(),
        "a name twice": arrival[:-1] + f',"Meta":"{FAMILY}"}}'.encode(),
        "an invalid kind": json.dumps(other).encode(),
        "bad UTF-8": arrival[:-1] + b',"X":"' + FAMILY.encode() + b'\xff"}',
    }.items():
        at.answered(what, redox.send(content))


def queries(at: Driven, redox: FakeRedox) -> None:
    """Send queries: some are answered, some fail."""
    at.answered("a query that fails", redox.send(body(redox, "PatientSearch.Query", 5)))
    at.answered("a query with an invalid answer", redox.send(body(redox, "PatientAdmin.VisitQuery", 5)))
    at.answered("a query", redox.send(body(redox, "PatientSearch.LocationQuery", 5)), discloses=True)
    at.answered("nobody's query", redox.send(body(redox, "Results.Query", 5)))


def database_errors(at: Driven, redox: FakeRedox, connection: psycopg.Connection) -> None:
    """Cause a database error that quotes the patient, and a statement that takes too long."""
    half = len(FAMILY) // 2  # written whole, it would be in the catalog
    connection.execute(f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION '%', '{FAMILY[:half]}' || '{FAMILY[half:]}' USING ERRCODE = '22023',
              DETAIL = '{FAMILY[:half]}' || '{FAMILY[half:]}'; END $$""")
    connection.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON messages FOR EACH ROW WHEN (NEW.facility = 'POISON') "
        "EXECUTE FUNCTION refuse()"
    )
    message = json.loads(body(redox, "PatientAdmin.Arrival", 6))
    message["Meta"]["FacilityCode"] = "POISON"
    at.answered("a row that is refused", redox.send(message))
    connection.execute("DROP TRIGGER refuse ON messages")
    with connection.transaction():
        connection.execute("LOCK TABLE payloads")
        at.answered("a row that is not taken", redox.send(body(redox, "PatientAdmin.Arrival", 7)))
    at.answered("the same, later", redox.send(body(redox, "PatientAdmin.Arrival", 7)))


def commands(at: Driven) -> None:
    """Run the commands that list and show, as text and JSON, and corrections with the patient in the reason."""
    (dead,) = rows(at, "SELECT min(id) FROM deliveries WHERE state = 'dead'")[0]
    (message,) = rows(at, "SELECT min(message_id) FROM deliveries WHERE state = 'dead'")[0]
    (quarantined,) = rows(at, "SELECT min(id) FROM messages WHERE state = 'quarantined'")[0]
    shown = [
        ("messages", "show", str(message)),
        ("messages", "show", str(quarantined)),
        ("deliveries", "show", str(dead)),
        ("audit", "list"),
    ]
    listed = [
        *shown,
        ("messages", "list"),
        ("deliveries", "list"),
        ("lanes", "list"),
        ("audit", "verify"),
        ("destination", "list"),
        ("destination", "show", "lab"),
        ("credential", "list"),
        ("source", "list"),
        ("source", "list", "--refused"),
        ("handlers", "list"),
        ("keys", "list"),
    ]
    at.ran(*shown, *([*arguments, "--json"] for arguments in listed))
    reason = ("--reason", f"for {PATIENT.given} {FAMILY}")
    at.ran(("deliveries", "retry", str(dead), *reason))
    until(lambda: rows(at, f"SELECT state FROM deliveries WHERE id = {dead}") == [("dead",)])
    at.ran(
        ("messages", "replay", str(message), "--handler", "talking", *reason),
        ("messages", "discard", str(quarantined), *reason),
        ("audit", "list", "--action", "message"),
        (
            "simulate",
            "--url",
            at.machine.url,
            "--destination",
            "lab",
            "--token-file",
            "lab.token",
            "--kind",
            "Flowsheet.New",
            "--seed",
            "1",
        ),
    )
    # Their findings do not matter here.
    at.outputs += at.machine.commands(
        ("status",),
        ("status", "--json"),
        ("check",),
        ("check", "--json"),
        ("messages", "show", "99999999"),
        ("messages", "list", "--since", FAMILY[:5]),
    )
    # A disclosure shows it, and is audited.
    for _, printed in at.machine.commands(
        ("audit", "list", "--action", "message.discard", "--notes", "--json", *reason),
        ("messages", "show", str(message), "--payload", *reason),
    ):
        assert FAMILY in printed
    for path in ("livez", "readyz", "metrics"):
        at.outputs.append((f"/{path}", _get(f"http://{at.admin}/{path}")))


def _get(url: str) -> bytes:
    try:
        with urlopen(url, timeout=30) as answer:
            return bytes(answer.read())
    except OSError as exc:
        return str(exc).encode()


@pytest.fixture(scope="module")
def canaries(driven: Driven) -> Canaries:
    """Return everything that may only be in its own file, or sealed."""
    keys = keyrings.load_keyring(driven.machine.data_dir / "keyring.json").keys
    return Canaries(
        {
            "the token": driven.token,
            "the other token": (driven.machine.root / "ward.token").read_text().strip(),
            "the signing secret": SIGNING_SECRET,
            "what a stranger presented": STRANGER,
            "the patient's name": FAMILY,
            "the patient's number": PATIENT.mrn,
            "the patient's other number": PATIENT.ssn,
            **{f"the key {key.id}": key.secret for key in keys},
        }
    )


def test_each_path_was_taken(driven: Driven) -> None:
    """Every path was taken: without that, finding nothing would prove nothing."""
    assert driven.statuses == {
        "a message": 200,
        "the same again": 200,
        "a notification": 200,
        "a kind that nobody asked for": 200,
        "a handler that fails within the request": 503,
        "a signed message": 200,
        "a handshake": 200,
        "a handshake by GET": 200,
        "a wrong token": 401,
        "a wrong token's handshake": 401,
        "a wrong token's handshake by GET": 401,
        "a wrong Bearer": 401,
        "two tokens": 401,
        "no signature": 401,
        "a token in the place of a name": 401,
        "a patient in the place of a name": 401,
        "an unknown source": 403,
        "no source": 403,
        "a body that is too large": 413,
        "a token in a query": 401,
        "an invalid path": 404,
        "an invalid method": 400,
        "an invalid version": 400,
        "an invalid header": 400,
        "a header with a NUL": 400,
        "a header that is too large": 431,
        "two lengths": 400,
        "an invalid chunk": 400,
        "a body that ends early": 400,
        "half a message": 200,
        "text": 200,
        "a name twice": 200,
        "an invalid kind": 200,
        "bad UTF-8": 200,
        "a query that fails": 500,
        "a query with an invalid answer": 500,
        "a query": 200,
        "nobody's query": 501,
        "a row that is refused": 200,
        "a row that is not taken": 503,
        "the same, later": 200,
    }
    ends = dict(
        rows(driven, "SELECT handler, array_agg(DISTINCT state) FROM deliveries WHERE generation = 1 GROUP BY 1")
    )
    assert ends == {
        "raising": ["dead"],
        "giving-up": ["dead"],
        "exiting": ["dead"],
        "storing": ["dead"],
        "asking": ["dead"],
        "talking": ["succeeded"],
        "within": ["pending"],
    }
    assert rows(
        driven,
        "SELECT quarantine_reason FROM messages WHERE facility IS NULL AND kind IS NULL "
        "AND quarantine_reason = 'unstorable_columns'",
    ) == [("unstorable_columns",)]


def test_not_in_the_tables(driven: Driven, canaries: Canaries) -> None:
    """No column of any table has a canary. The text of a plugin's error is sealed."""
    assert list(canaries.in_tables(driven.url)) == []
    assert rows(driven, "SELECT count(*) > 0 FROM deliveries WHERE error_sealed IS NOT NULL") == [(True,)]


def test_not_in_the_logs(driven: Driven, canaries: Canaries) -> None:
    """No log has a canary, at level debug, of any process."""
    assert canaries.within(driven.machine.log.read_bytes(), "the log") == []
    assert {"request.served", "handler.ended", "ledger.unstorable"} & {line["event"] for line in driven.machine.lines()}


def test_not_in_what_is_said(driven: Driven, canaries: Canaries) -> None:
    """No answer of the receiver, output of a command or page for monitoring has a canary."""
    assert [found for what, text in driven.outputs for found in canaries.within(text, what)] == []


def test_not_in_files(driven: Driven, canaries: Canaries) -> None:
    """No file has a canary, PostgreSQL's tables, write-ahead log and server log included."""
    root, home = driven.machine.root, driven.machine.data_dir
    secrets = [home / "keyring.json", *(root / name for name in ("lab.token", "ward.token", "signing.secret"))]
    with psycopg.connect(driven.url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
    assert list(canaries.in_files(root, but=secrets)) == []
    cluster = driven.machine.cluster.directory
    assert (cluster / "pg_wal").is_dir()
    if not cluster.is_relative_to(root):
        assert list(canaries.in_files(cluster)) == []


def test_not_in_processes(driven: Driven, canaries: Canaries) -> None:
    """No argument or environment that other users can list has a secret."""
    family = driven.machine.family()
    assert len(family) > 5
    assert list(canaries.in_processes(family)) == []


def test_what_is_looked_for_is_found(tmp_path: Path, canaries: Canaries) -> None:
    """The search finds a canary in every encoding."""
    (tmp_path / "plain").write_text(f"x{FAMILY}y")
    (tmp_path / "hex").write_text(PATIENT.mrn.encode().hex().upper())
    (tmp_path / "lower").write_text(f"{FAMILY}@example.com".lower())
    for before in range(3):
        (tmp_path / f"base64-{before}").write_bytes(b64encode(b"x" * before + SIGNING_SECRET.encode() + b"yyyy"))
    assert len(list(canaries.in_files(tmp_path))) == 6
