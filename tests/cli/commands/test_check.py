"""`check` examines this host and its database. Each problem has its fix."""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import trustme
from click.testing import CliRunner
from pydantic import SecretStr
from sqlalchemy import Engine, insert, text

from receiver import keyring as keyrings
from receiver.cli import main
from receiver.cli.checks import database, host
from receiver.database import clock, migrations
from receiver.settings import Settings
from receiver.storage import schema
from receiver.storage.registry.changes import RegistryChanges
from receiver.storage.registry.handler_changes import HandlerSpec
from tests.support.ports import free_port

Check = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def check(database_url: str, keyring_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Run `check --json` on a host without problems, and return the results by name."""
    data_dir = tmp_path / "data"
    data_dir.mkdir(mode=0o700)
    keyring_path.rename(data_dir / "keyring.json")
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(data_dir))
    monkeypatch.setenv("DATABASE_URL", database_url)

    def run(*arguments: str) -> dict[str, dict[str, Any]]:
        done = CliRunner().invoke(main, ["check", *arguments, "--json"])
        found = json.loads(done.stdout)
        assert done.exit_code == any(each["state"] == "bad" for each in found)
        return {each["name"]: each for each in found}

    return run


def amiss(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the state of each result that is not OK, except the durability of the tests' own database."""
    return {name: each["state"] for name, each in found.items() if each["state"] != "ok" and name != "durability"}


def destination(registration: RegistryChanges, engine: Engine, **more: Any) -> None:
    """Register the destination `lab`."""
    registration.add_destination(
        "lab",
        datetime.now(UTC),
        **{
            "environment": "development",
            "require": ["token"],
            "sources_policy": "registered",
            "on_unknown_source": "reject",
            "test_messages": "accept",
            "reply_with": None,
            "token": "a-token-of-thirty-two-characters",
            **more,
        },
    )
    registration.add_source("lab", "s-1", datetime.now(UTC), name=None)
    registration.enable_handler(
        "lab",
        HandlerSpec(
            handler="search",
            role="responder",
            patterns=("*",),
            ordering="none",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="dead",
            max_attempts=1,
            timeout=60.0,
        ),
        datetime.now(UTC),
    )
    with engine.begin() as connection:
        connection.execute(
            insert(schema.listeners).values(name="r", role="receiver", host="there", pid=1, address="127.0.0.1:8080")
        )


def test_a_sound_host(check: Check, engine: Engine, registration: RegistryChanges) -> None:
    """On a host without problems every result is OK. The names are a contract."""
    destination(registration, engine)
    found = check()
    assert amiss(found) == {}
    assert list(found) == [
        "settings",
        "data_directory",
        "disk",
        "keyring",
        "database",
        "writable",
        "durability",
        "clock",
        "migrations",
        "keys",
        "credentials",
        "plugins",
        "workers",
        "listener",
        "admin_listener",
    ]
    assert found["durability"]["state"] == "bad"
    assert {tuple(each) for each in found.values()} == {("name", "state", "message", "fix")}


def test_settings_that_nothing_reads(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelled variable is found in the environment and in the .env file. The fix is the probable name."""
    monkeypatch.setenv("RECEIVER_BINDD", "127.0.0.1:1")
    env_file = Path(os.environ["RECEIVER_DATA_DIR"], ".env")
    env_file.write_text("# RECEIVER_COMMENT=1\nexport RECEIVER_TREADS=8\nPATH=/bin\n")
    env_file.chmod(0o600)
    found = check()
    assert amiss(found) == {"settings": "bad"}
    assert found["settings"]["message"] == (
        "unknown variable RECEIVER_BINDD (RECEIVER_BIND?), RECEIVER_TREADS (RECEIVER_THREADS?)"
    )


def test_fail_points(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fault injection on, `check` says where and how processes started here would fail."""
    monkeypatch.setenv("RECEIVER_FAILPOINTS", "ledger.committed=kill@0.02,lane.commanded=delay:1")
    found = check()
    assert amiss(found) == {"failpoints": "bad"}
    assert found["failpoints"]["message"] == (
        "fault injection is on: processes started here fail at ledger.committed (kill), lane.commanded (delay)"
    )


def test_settings_that_are_wrong(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every invalid variable is named, and nothing else is checked."""
    monkeypatch.setenv("RECEIVER_BIND", "here")
    monkeypatch.setenv("RECEIVER_THREADS", "many")
    found = check()
    assert list(found) == ["settings"]
    assert "RECEIVER_BIND: " in found["settings"]["message"]
    assert "RECEIVER_THREADS: " in found["settings"]["message"]


def test_files_that_others_can_read(check: Check) -> None:
    """A file that other users can read is found, with the command that protects it."""
    data_dir = Path(os.environ["RECEIVER_DATA_DIR"])
    (data_dir / ".env").write_text("")
    for path, mode in ((data_dir, 0o755), (data_dir / ".env", 0o644), (data_dir / "keyring.json", 0o640)):
        path.chmod(mode)
    found = check()
    assert amiss(found) == {"data_directory": "bad", "env_file": "bad", "keyring": "bad"}
    assert found["env_file"]["fix"] == f"chmod 600 {data_dir / '.env'}"


def test_a_data_directory_that_is_not_there(check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a new host the fix is the command that creates the data directory."""
    monkeypatch.setenv("RECEIVER_KEYRING", str(Path(os.environ["RECEIVER_DATA_DIR"], "keyring.json")))
    monkeypatch.setenv("RECEIVER_DATA_DIR", str(tmp_path / "nowhere"))
    assert amiss(check()) == {"data_directory": "warn"}


def test_it_makes_no_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A mistyped data directory is reported as missing. Nothing is created."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    done = CliRunner().invoke(main, ["check", "--data-dir", str(tmp_path / "nowhere"), "--json"])
    assert done.exit_code == 1
    found = {each["name"]: each for each in json.loads(done.stdout)}
    assert f"no database exists in {tmp_path / 'nowhere'}: check --data-dir" in found["database"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_why_a_tls_connection_fails(check: Check) -> None:
    """The reason of a failed TLS connection is OpenSSL's or the operating system's."""
    with public("/livez") as url:
        plain = check("--url", url.replace("http:", "https:"))["tls"]["message"]
    assert "TLS failed: " in plain
    assert "Error" not in plain
    assert check("--url", f"https://127.0.0.1:{free_port()}")["tls"]["message"].endswith(": Connection refused")


def test_listeners_that_the_world_reaches(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listeners that are not on loopback get a warning: the public one is plain HTTP, the admin one is private."""
    monkeypatch.setenv("RECEIVER_BIND", "0.0.0.0:8080")
    monkeypatch.setenv("RECEIVER_ADMIN_BIND", "[2001:db8::1]:8081")
    assert amiss(check()) == {"listener": "warn", "admin_listener": "warn"}
    monkeypatch.setenv("RECEIVER_BIND", "localhost:8080")
    monkeypatch.setenv("RECEIVER_ADMIN_BIND", "[::1]:8081")
    assert amiss(check()) == {}


@pytest.mark.parametrize(
    ("proxies", "message"),
    [("10.0.0.0/8,0.0.0.0/0", "0.0.0.0/0"), ("::/0", "::/0"), ("128.0.0.0/1", "128.0.0.0/1"), ("10.0.0.0/8", None)],
)
def test_proxies_that_are_anybody(
    check: Check, monkeypatch: pytest.MonkeyPatch, proxies: str, message: str | None
) -> None:
    """A wide trusted network gets a warning: every host in it can claim any client address."""
    monkeypatch.setenv("RECEIVER_TRUSTED_PROXIES", proxies)
    found = check()
    assert amiss(found) == ({} if message is None else {"trusted_proxies": "warn"})
    if message is not None:
        assert f"trusts {message}:" in found["trusted_proxies"]["message"]


@pytest.mark.parametrize(
    ("account", "there", "warned"),
    [(None, False, True), (None, True, False), ("nobody", True, True), ("somebody", False, False)],
)
def test_the_account_of_the_embedded_database(
    monkeypatch: pytest.MonkeyPatch, account: str | None, *, there: bool, warned: bool
) -> None:
    """Started by root without an account `postgres`, it runs as nobody, as other programs do: a warning."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(host, "_exists", lambda _: there)
    found = list(host._account(Settings(postgres_account=account)))
    assert [each.state for each in found] == (["warn"] if warned else [])
    assert list(host._account(Settings(database_url=SecretStr("postgresql://u@h/n"), postgres_account=account))) == []


def test_a_full_disk(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little free disk space is found before the disk is full."""
    monkeypatch.setattr(host, "_LEAST_DISK", 1 << 60)
    assert amiss(check()) == {"disk": "bad"}


def test_a_keyring_beside_a_backup(check: Check) -> None:
    """A keyring in the same directory as a backup is found: together they defeat the encryption."""
    Path(os.environ["RECEIVER_DATA_DIR"], "backup.json").touch()
    assert amiss(check()) == {"keyring": "bad"}


def test_another_keyring(check: Check) -> None:
    """Another keyring than the database's is found. Without a keyring, the keys are not checked."""
    path = Path(os.environ["RECEIVER_DATA_DIR"], "keyring.json")
    path.unlink()
    assert amiss(check()) == {"keyring": "bad"}
    keyrings.create(datetime.now(UTC)).save(path)
    assert amiss(check()) == {"keys": "bad"}


def test_no_database(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that does not answer is reported, without the password."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://somebody:canary-password@127.0.0.1:9/nothing")
    found = check()
    assert amiss(found) == {"database": "bad"}
    assert "canary-password" not in json.dumps(found)


def test_a_schema_that_is_behind(check: Check, engine: Engine) -> None:
    """A schema that is behind is found, with the command. Checks that read its tables are skipped."""
    migrations.downgrade(engine, "base")
    found = check()
    assert amiss(found) == {"migrations": "bad"}
    assert found["migrations"]["fix"] == "redox-receiver db upgrade"


def test_a_database_that_takes_no_writes(check: Check, engine: Engine) -> None:
    """A read-only database is found."""
    with engine.begin() as connection:
        connection.execute(text(f'ALTER DATABASE "{engine.url.database}" SET default_transaction_read_only = on'))
    engine.dispose()
    assert amiss(check()) == {"writable": "bad"}


def test_a_clock_that_is_wrong(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that differs from the database's is found."""
    monkeypatch.setattr(clock, "MAX_CLOCK_SKEW", timedelta(0))
    assert amiss(check()) == {"clock": "bad"}


def test_an_old_postgresql(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PostgreSQL older than what is supported is found."""
    monkeypatch.setattr(database, "_OLDEST_POSTGRESQL", 99)
    assert amiss(check()) == {"database": "bad"}


def test_credentials(check: Check, engine: Engine, registration: RegistryChanges) -> None:
    """A credential that expires soon is a warning. A required kind without a live credential is bad."""
    now = datetime.now(UTC)
    destination(registration, engine)
    registration.add_credential(
        "lab", now, "token", {}, b"another-token-of-32-characters-x", expires_at=now + timedelta(days=9)
    )
    assert amiss(check()) == {"credentials": "warn"}
    registration.set_destination("lab", now, {"require": ["hmac+token", "hmac"]})
    found = check()
    assert amiss(found) == {"credentials": "bad"}
    assert found["credentials"]["fix"] == "redox-receiver credential add lab --kind …"


def test_workers(check: Check, engine: Engine, registration: RegistryChanges) -> None:
    """Enabled handlers need a live worker that has loaded them."""
    destination(registration, engine)
    registration.enable_handler(
        "lab",
        HandlerSpec(
            handler="register",
            role="handler",
            patterns=("*",),
            ordering="source",
            patient_key=None,
            acknowledge="after_commit",
            on_failure="dead",
            max_attempts=3,
            timeout=60.0,
        ),
        datetime.now(UTC),
    )
    assert check()["workers"]["message"] == "no delivery worker is alive: deliveries wait"
    with engine.begin() as connection:
        connection.execute(insert(schema.workers).values(name="w", host="h", pid=1, handlers=["another"]))
    assert check()["workers"]["message"] == "no live worker has loaded register"
    with engine.begin() as connection:
        connection.execute(schema.workers.update().values(handlers=["register"]))
    assert amiss(check()) == {}


def test_plugins(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that cannot be imported is named."""
    monkeypatch.setenv("RECEIVER_HANDLERS", "receiver.testing.example")
    assert check()["plugins"] == {"name": "plugins", "state": "ok", "message": "3 handlers imported", "fix": None}
    monkeypatch.setenv("RECEIVER_HANDLERS", "no.such.plugin")
    found = check()
    assert amiss(found) == {"plugins": "bad"}
    assert "no.such.plugin" in found["plugins"]["message"]


# --- from outside


@contextmanager
def public(*paths: str, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """Run a listener that answers 200 at these paths and 404 elsewhere. Yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in paths else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"{'http' if tls is None else 'https'}://localhost:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def certified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_after: datetime) -> ssl.SSLContext:
    """Return a server's TLS context with a certificate that expires then, and that this process trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", not_after=not_after).configure_cert(made)
    return made


@pytest.mark.parametrize(("days", "state"), [(60.5, "ok"), (5.5, "bad")])
def test_from_outside(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: float, state: str) -> None:
    """--url checks the certificate's expiry, and that the admin listener cannot be reached."""
    tls = certified(tmp_path, monkeypatch, datetime.now(UTC) + timedelta(days=days))
    with public("/livez", tls=tls) as url:
        found = check("--url", url)
    assert {name: found[name]["state"] for name in ("tls", "reachable")} == {"tls": state, "reachable": "ok"}
    assert found["tls"]["message"] == f"the certificate expires in {int(days)} days"
    assert "admin_hidden" not in found


def test_wrong_from_outside(check: Check) -> None:
    """Plain HTTP, and a proxy that forwards to the admin listener, are found."""
    with public("/readyz") as url:
        assert amiss(check("--url", url)) == {"tls": "bad", "reachable": "bad", "admin_hidden": "bad"}


def test_a_certificate_that_nobody_trusts(check: Check, tmp_path: Path) -> None:
    """The reason of an untrusted certificate is OpenSSL's."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(made)
    with public("/livez", tls=made) as url:
        found = check("--url", url)
    assert "the certificate is not valid: " in found["tls"]["message"]
    assert "issuer certificate" in found["tls"]["message"]
    assert found["reachable"]["state"] == "bad"
