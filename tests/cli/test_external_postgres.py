"""Each reason why an external PostgreSQL cannot be reached has a message of its own. The situations are real."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import psycopg
import pytest
import trustme
from sqlalchemy import make_url

from receiver.database import connection_errors
from tests.cli.conftest import Commands
from tests.support.external_postgres import PASSWORD, ExternalPostgres, external_postgres, tls_front
from tests.support.ports import free_port


@pytest.fixture(scope="module")
def server() -> Iterator[ExternalPostgres]:
    """One server for all tests of this file."""
    with external_postgres() as running:
        yield running


@contextmanager
def as_it_is(_: ExternalPostgres) -> Iterator[None]:
    """Leave the server as it is."""
    yield


@contextmanager
def full(server: ExternalPostgres) -> Iterator[None]:
    """Use every connection that `plain` may have."""
    with ExitStack() as stack:
        with suppress(psycopg.OperationalError):
            while True:
                stack.enter_context(psycopg.connect(server.url()))
        yield


def altered(*statements: str, back: str) -> Callable[[ExternalPostgres], object]:
    """Run these statements as the superuser."""

    @contextmanager
    def alter(server: ExternalPostgres) -> Iterator[None]:
        server.execute(*statements)
        try:
            yield
        finally:
            server.execute(back)

    return alter


# The change of the server, DATABASE_URL, the problem in the message, and its fix.
SITUATIONS: dict[str, tuple[Callable[[ExternalPostgres], object], Callable[[ExternalPostgres], str], str, str]] = {
    "wrong password": (
        as_it_is,
        lambda at: at.url(password="wrong"),
        "refuses the password of user plain",
        "correct the user and the password in DATABASE_URL",
    ),
    "no password": (
        as_it_is,
        lambda at: at.url().replace(f":{PASSWORD.replace(' ', '%20')}@", "@"),
        "asks for the password of user plain",
        "write DATABASE_URL as",
    ),
    "missing database": (
        as_it_is,
        lambda at: at.url(database="nowhere"),
        "has no database nowhere",
        "createdb nowhere",
    ),
    "closed database": (
        altered(
            "ALTER DATABASE receiver ALLOW_CONNECTIONS false", back="ALTER DATABASE receiver ALLOW_CONNECTIONS true"
        ),
        lambda at: at.url(),
        "accepts no connections to database receiver",
        "ALLOW_CONNECTIONS true",
    ),
    "no privilege": (
        altered(
            "REVOKE CONNECT ON DATABASE receiver FROM public, plain",
            "ALTER DATABASE receiver OWNER TO secret",
            back="GRANT CONNECT ON DATABASE receiver TO plain",
        ),
        lambda at: at.url(),
        "user plain may not connect",
        "GRANT CONNECT ON DATABASE receiver TO plain",
    ),
    "closed port": (as_it_is, lambda at: at.url(port=free_port()), "nothing listens at 127.0.0.1:", "the port in"),
    "no socket": (
        as_it_is,
        lambda _: "postgresql:///receiver?host=/nowhere",
        "nothing listens at /nowhere",
        "start PostgreSQL",
    ),
    "unknown host": (
        as_it_is,
        lambda at: at.url(host="no-such-host.invalid"),
        "the host no-such-host.invalid cannot be found",
        "correct the host in DATABASE_URL",
    ),
    "TLS not offered": (as_it_is, lambda at: at.url(sslmode="require"), "requires TLS", "ssl = on in postgresql.conf"),
    "TLS required": (
        as_it_is,
        lambda at: at.url("secret", sslmode="disable"),
        "user secret",
        "set sslmode=require in DATABASE_URL",
    ),
    "too many connections": (full, lambda at: at.url(), "has no connection left", "max_connections in postgresql.conf"),
    "too many of a user": (
        altered("ALTER ROLE plain CONNECTION LIMIT 0", back="ALTER ROLE plain CONNECTION LIMIT -1"),
        lambda at: at.url(),
        "has no connection left for user plain",
        "CONNECTION LIMIT",
    ),
    "unknown option": (
        as_it_is,
        lambda at: at.url(sslmod="require"),
        "an option that is not valid",
        "what follows the ?",
    ),
    "wrong value": (as_it_is, lambda at: at.url(sslmode="maybe"), "an option that is not valid", "what follows the ?"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_each_has_its_sentence(
    server: ExternalPostgres, run: Commands, monkeypatch: pytest.MonkeyPatch, situation: str
) -> None:
    """The message names the problem, the address and the setting, without the password or a useless command."""
    happens, url, problem, fix = SITUATIONS[situation]
    monkeypatch.setenv("DATABASE_URL", url(server))
    with happens(server):  # type: ignore[attr-defined]  # each makes a context
        (printed,) = run.fails("destination", "list").splitlines()
        found = json.loads(run("check", "--json", status=1).stdout)
    assert problem in printed
    assert fix in printed
    assert "redox-receiver" not in printed
    (message,) = [each for each in found if each["name"] == "database"]
    assert printed == f"Error: {message['message']}: {message['fix']}"
    for shown in (printed, json.dumps(found)):
        assert PASSWORD not in shown
        assert PASSWORD.replace(" ", "%20") not in shown


@pytest.mark.parametrize(
    ("host", "trusted", "problem", "fix"),
    [
        ("127.0.0.1", None, "root certificate file cannot be read", "sslrootcert in DATABASE_URL"),
        ("127.0.0.1", "other", "is not trusted", "the authority that signed it"),
        ("localhost", "right", "is for another host", "use the host"),
    ],
)
def test_a_certificate_that_is_refused(
    server: ExternalPostgres,
    run: Commands,
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    trusted: str | None,
    problem: str,
    fix: str,
) -> None:
    """With sslmode=verify-full the message says why: no certificate authority, another one, or another host name."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    monkeypatch.setenv("HOME", "/nowhere")
    signers = {"right": authority, "other": trustme.CA()}
    with ExitStack() as stack:
        port = stack.enter_context(tls_front(server, context))
        files = {name: stack.enter_context(ca.cert_pem.tempfile()) for name, ca in signers.items()}
        options = {} if trusted is None else {"sslrootcert": files[trusted]}
        with psycopg.connect(server.url(port=port, sslmode="verify-full", sslrootcert=files["right"])):
            pass
        monkeypatch.setenv("DATABASE_URL", server.url(host=host, port=port, sslmode="verify-full", **options))
        printed = run.fails("destination", "list")
    assert problem in printed
    assert fix in printed


def test_an_address_that_never_answers(run: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that accepts the connection and never answers is given up after three seconds."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("DATABASE_URL", f"postgresql://me:hush@127.0.0.1:{silent.getsockname()[1]}/db")
        printed = run.fails("destination", "list")
    assert "does not answer: check the network and the firewall" in printed


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("FATAL:  Passwort-Authentifizierung für Benutzer »plain« fehlgeschlagen", connection_errors.LOST),
        ("FATAL:  the database system is starting up", "starting"),
        ('FATAL:  role "me" does not exist', "user_missing"),
        ('FATAL:  database "a database does not exist" does not exist', "database_missing"),
        (
            "Multiple connection attempts failed. - host: 'a' … Connection refused - host: 'a' … timeout expired",
            "nothing_listens",
        ),
        ("server closed the connection unexpectedly", connection_errors.LOST),
    ],
)
def test_a_text_has_its_code(text: str, code: str) -> None:
    """Texts that cannot be provoked here have a code too. An unknown text gets the general message."""
    assert connection_errors.code_of(text) == code
    problem, fix = connection_errors.explain(code, make_url("postgresql://me:hush@db.example:5433/receiver"))
    assert "db.example:5433" in problem
    assert "hush" not in problem + fix
